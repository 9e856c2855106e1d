"""The folder of an export: its record, its config, the names and shapes of its tensors, and every file that lies in it.

transformers and servers pick up files by their names, and fields of config.json that change what is loaded. So
everything that an export does not consist of is wrong, unless it is known to be read by people alone.
"""

from pathlib import Path
from typing import Any

import torch

from megatron_lpr.conversion.record import RECORD_FILE, ExportRecord, Made, digests
from megatron_lpr.conversion.verify.report import Check, listed
from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.families.export_config import export_config
from megatron_lpr.files.new_folder import companions_of
from megatron_lpr.files.safetensors_io import INDEX_FILE, SafetensorsReader

# Written into config.json by those who copy or upload a model; nothing follows from them.
_SAYS_NOTHING = {"_name_or_path", "transformers_version"}
_FOR_PEOPLE = (".md", ".png", ".jpg", ".jpeg", ".svg", ".pdf")
_FOR_PEOPLE_NAMES = ("license", "notice", "use_policy")


def check_record(
    record: ExportRecord | None,
    checkpoint: Made | None,
    recipe: Made | None,
    num_frozen: int | None,
    base_dir: Path,
    grafted_on: str | Path | None,
    frozen_sha256: str,
) -> Check:
    """Do the checkpoint, the record that lies in an export, and whoever asks say the same of what was done?

    Arguments as of `verify_export`; record: the export's own. frozen_sha256: of the export as it is now.
    """
    problems: list[str] = []
    notes: list[str] = []
    own = f"the export's {RECORD_FILE}"
    if recipe and checkpoint:
        notes += checkpoint.differences(recipe, "the checkpoint", "the recipe, which does not count")
    if record:
        if checkpoint:
            problems += record.made.differences(checkpoint, own, "the checkpoint")
        elif recipe:
            problems += record.made.differences(recipe, own, "the recipe: give the run's own, or --checkpoint")
        if num_frozen is not None and record.made.expansion.num_experts and num_frozen != record.made.untouched:
            problems.append(f"{record.made.untouched} experts are frozen in {own}, {num_frozen} were asked for")
        problems += _other_files(record, base_dir, grafted_on)
        if record.frozen_sha256 and frozen_sha256 and record.frozen_sha256 != frozen_sha256:
            problems.append("the frozen tensors are not those that were exported")
    elif checkpoint:
        notes.append(f"the export has no {RECORD_FILE}; the checkpoint says what was done")
    else:
        source = "the recipe" if recipe else "the command" if num_frozen is not None else "its config"
        notes.append(f"the export has no {RECORD_FILE}: what is frozen, and top-k, are taken from {source}")
    if record:
        notes.append("the export's own agrees" + (f", step {record.step}" if record.step is not None else ""))
    return Check(name="record", ok=not problems, detail="; ".join(problems or notes))


def _other_files(record: ExportRecord, base_dir: Path, grafted_on: str | Path | None) -> list[str]:
    """Folders that are not the models which the export was made of, by their small files."""
    if record.instruct is None:
        if grafted_on is not None:
            return ["the export was not grafted (--graft-delta)"]
        pairs = [(record.base, base_dir)]
    elif grafted_on is None:
        return ["the export was grafted: give --graft-delta BASE INSTRUCT, the two models that it was made with"]
    else:
        pairs = [(record.base, Path(grafted_on)), (record.instruct, base_dir)]
    return [
        f"'{folder}' is not the model that the export was made with: {listed(changed)} differ"
        for saved, folder in pairs
        if (changed := sorted({name for name, _ in digests(folder).items() ^ saved.items()}))
    ]


def config_problems(
    config: dict[str, Any], arch: Architecture, base_config: dict[str, Any], made: Made, dtype: str
) -> list[str]:
    """Fields that do not follow from the base and what was made of it, and fields that no export has."""
    expansion = made.expansion
    expected = export_config(arch, base_config, num_experts=expansion.num_experts, topk=expansion.topk, dtype=dtype)
    wrong = [
        f"{key} = {config.get(key)!r} (not {value!r})"
        for key, value in expected.items()
        if config.get(key) != value or isinstance(config.get(key), bool) != isinstance(value, bool)
    ]
    extra = sorted(config.keys() - expected.keys() - _SAYS_NOTHING)
    return ([listed(wrong)] if wrong else []) + ([f"no export has {listed(extra)}"] if extra else [])


def census_problems(
    export: SafetensorsReader, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype | None
) -> list[str]:
    """Names and shapes, and with `dtype` dtypes as well."""
    keys = set(export.keys())
    problems = []
    if missing := [key for key in shapes if key not in keys]:
        problems.append(f"{len(missing)} missing: {listed(missing)}")
    if unexpected := sorted(keys - shapes.keys()):
        problems.append(f"{len(unexpected)} unexpected: {listed(unexpected)}")
    present = [key for key in shapes if key in keys]
    if misshapen := [f"{key} {export.shape(key)}" for key in present if export.shape(key) != shapes[key]]:
        problems.append(f"{len(misshapen)} of another shape: {listed(misshapen)}")
    if dtype and (cast := [f"{key} {export.dtype(key)}" for key in present if export.dtype(key) != dtype]):
        problems.append(f"{len(cast)} of another dtype than the config says: {listed(cast)}")
    try:
        export.check_index()
    except UserError as error:
        problems.append(str(error))
    return problems


def stock_shapes(hf_dir: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the class named in config.json loads, built on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of whatever kind the damage is
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"transformers cannot read '{hf_dir}/config.json': {reason}") from error
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    shapes = {name: tuple(tensor.shape) for name, tensor in _as_on_disk(model, tensors).items()}
    # a shared expert of width 0: nothing is missing where its tensors are, and vLLM has no place for them
    return {name: shape for name, shape in shapes.items() if 0 not in shape}


def _as_on_disk(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 fuses experts in memory and stores them one by one; 4.x never fuses them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return tensors
    return revert_weight_conversion(model, tensors)


def file_problems(export_dir: Path, base_dir: Path, weights: set[str]) -> list[str]:
    """Companions that are not the base's, and files that do not belong there. weights: the safetensors files."""
    companions = companions_of(base_dir)
    differ = [
        name
        for name in companions
        if not (export_dir / name).is_file() or (export_dir / name).read_bytes() != (base_dir / name).read_bytes()
    ]
    known = {"config.json", "README.md", RECORD_FILE, INDEX_FILE, *weights, *companions}
    foreign = sorted(path.name for path in export_dir.iterdir() if path.name not in known and not _for_people(path))
    problems = [f"missing or different: {listed(differ)}"] if differ else []
    return problems + ([f"neither the base's nor an export's: {listed(foreign)}"] if foreign else [])


def _for_people(path: Path) -> bool:
    """A card, a licence, and what git or a downloader keeps for itself; no server reads them."""
    name = path.name.lower()
    return name.startswith(".") or name.endswith(_FOR_PEOPLE) or name.startswith(_FOR_PEOPLE_NAMES)
