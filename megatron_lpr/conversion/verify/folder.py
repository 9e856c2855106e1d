"""The folder of an export: its config, the names and shapes of its tensors, and every file that lies in it.

transformers and servers pick up files by their names, and fields of config.json that change what is loaded. So
everything that an export does not consist of is wrong, unless it is known to be read by people alone.
"""

from pathlib import Path
from typing import Any

import torch

from megatron_lpr.conversion.record import RECORD_FILE, Made
from megatron_lpr.conversion.verify.report import listed
from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.families.export_config import export_config
from megatron_lpr.files.new_folder import COMPANION_FILES
from megatron_lpr.files.safetensors_io import INDEX_FILE, SafetensorsReader

# Written into config.json by those who copy or upload a model; nothing follows from them.
_SAYS_NOTHING = {"_name_or_path", "transformers_version"}
_FOR_PEOPLE = (".md", ".png", ".jpg", ".jpeg", ".svg", ".pdf")
_FOR_PEOPLE_NAMES = ("license", "notice", "use_policy")


def config_problems(
    config: dict[str, Any], arch: Architecture, base_config: dict[str, Any], made: Made, dtype: str
) -> list[str]:
    """Fields that do not follow from the base and what was made of it, and fields that no export has."""
    expected = export_config(arch, base_config, num_experts=made.num_experts, topk=made.topk, dtype=dtype)
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


def companions_of(base_dir: Path) -> list[str]:
    """The tokenizer and generation files that an export of this model has."""
    return [name for name in COMPANION_FILES if (base_dir / name).is_file()]


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
