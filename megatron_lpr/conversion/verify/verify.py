"""Is an export what it claims to be? Its files, its names, its config, and every tensor against the base model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lpr.conversion.record import Made, read_record
from megatron_lpr.conversion.verify.folder import (
    census_problems,
    check_record,
    config_problems,
    file_problems,
    stock_shapes,
)
from megatron_lpr.conversion.verify.report import Check, VerifyReport, check, listed
from megatron_lpr.conversion.verify.tensors import Scan, digest_of_digests, scan
from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, Family, family_of, read_architecture
from megatron_lpr.families.expansion import Expansion, origins, with_layers_kept_dense
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.families.weights import open_weights
from megatron_lpr.files.new_folder import companions_of
from megatron_lpr.files.safetensors_io import SafetensorsReader, torch_dtype
from megatron_lpr.model.load.upcycle import check_checkpoint


def verify_export(
    export_dir: str | Path,
    base_dir: str | Path,
    *,
    checkpoint: Made | None = None,
    recipe: Made | None = None,
    num_frozen: int | None = None,
    grafted_on: str | Path | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Checks an export, MoE or dense, against the HF model it was made from, which may have experts itself.

    What was made of the base, so which experts are frozen and how many a token goes to, says `checkpoint`; without it
    the export's own record, and only without both `recipe`, or the config with `num_frozen` (default 1). Where these
    contradict each other, the check "record" fails.

    Frozen tensors (attention, norms, embeddings, frozen experts) are compared by SHA-256 after casting the base's to
    the dtype of training and to the export's, which is exact whenever these are at least as wide. A dense export has no
    frozen tensors, nor has one of which everything was trained: there the ones that differ from the base are counted.

    grafted_on: of a grafted export; the base of the delta, while `base_dir` is the instruct model whose config,
    tokenizer and frozen tensors the export has.

    UserError when either folder cannot be read at all, or the export is of another architecture.
    """
    export_dir, base_dir = Path(export_dir), Path(base_dir)
    arch, base_config = read_architecture(base_dir), read_config(base_dir)
    config = read_config(export_dir)
    base, export = open_weights(base_dir, arch), SafetensorsReader(export_dir)
    check_checkpoint(base, arch)
    _check_class(config, family_of(arch), export_dir)
    record = read_record(export_dir)
    made = checkpoint or (record and record.made) or recipe or _as_config_says(config, arch, num_frozen, export_dir)
    num_experts = made.expansion.num_experts
    has_frozen = made.untouched > 0
    if has_frozen:
        Expansion(num_experts=num_experts, num_frozen=made.untouched, topk=1).check()
    arch = _as_exported(arch, config, made)
    shapes = family_of(arch).shapes(arch, num_experts)
    dtype_name = record.dtype if record else config.get("dtype", "float32")
    dtype = torch_dtype(dtype_name)
    sound = [name for name, shape in shapes.items() if name in export and _shape(export, name) == shape]
    trained = [torch_dtype(made.dtype)] if made.dtype and not grafted_on else []  # grafted ones are never trained in
    found = scan(export, base, origins(arch, num_experts), sound, [*trained, dtype], made.untouched, progress)
    frozen_sha256 = digest_of_digests(found.frozen.items()) if has_frozen else ""
    names = f"{len(shapes)} names and shapes agree"
    return VerifyReport(
        checks=(
            check_record(record, checkpoint, recipe, num_frozen, base_dir, grafted_on, frozen_sha256),
            check(
                "config",
                lambda: config_problems(config, arch, base_config, made, dtype_name),
                "every field follows from the base model",
            ),
            check("tensors", lambda: census_problems(export, shapes, dtype), names),
            check("stock class", lambda: census_problems(export, stock_shapes(export_dir), None), names),
            *_check_values(found, has_frozen),
            check(
                "files",
                lambda: file_problems(export_dir, base_dir, export.files()),
                f"{len(companions_of(base_dir))} tokenizer and generation files equal, no others",
            ),
        ),
        frozen_sha256=frozen_sha256,
    )


def _check_class(config: dict[str, Any], family: Family, export_dir: Path) -> None:
    name = _architecture(config)
    dense = family.hf_class(0).architecture
    if name not in (dense, family.moe.architecture):
        raise UserError(
            f"'{export_dir}' is a {name} with {config.get(family.moe.fields['num_experts'][0])} experts; "
            f"an export of a {family.dense.architecture} is a {family.moe.architecture}, or dense a {dense}"
        )


def _architecture(config: dict[str, Any]) -> Any:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names else names


def _as_config_says(config: dict[str, Any], arch: Architecture, num_frozen: int | None, export_dir: Path) -> Made:
    """Of an export about which nothing else is known. An expanded one has at least the base's experts frozen."""
    family = family_of(arch)
    if _architecture(config) == family.hf_class(0).architecture:
        return Made(expansion=Expansion())
    num_experts, topk = (_number(config, family.moe.fields[name][0], export_dir) for name in ("num_experts", "topk"))
    layers = config.get("mlp_only_layers") or []
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise UserError(f"'{export_dir}/config.json' has mlp_only_layers = {layers!r}: not a list of layers")
    frozen = 1 if num_frozen is None else num_frozen
    if frozen and num_experts > arch.num_experts:
        frozen = max(frozen, arch.num_experts)
    expansion = Expansion(num_experts=num_experts, num_frozen=frozen, topk=topk, mlp_only_layers=tuple(layers))
    return Made(expansion=expansion)


def _number(config: dict[str, Any], field: str, export_dir: Path) -> int:
    value = config.get(field)
    if type(value) is not int or value < 1:
        raise UserError(f"'{export_dir}/config.json' has {field} = {value!r}: not a number")
    return value


def _as_exported(arch: Architecture, config: dict[str, Any], made: Made) -> Architecture:
    """The base with what was chosen for the export: which layers stayed dense, how wide the zero shared expert is."""
    if made.expansion.num_experts:
        arch = with_layers_kept_dense(arch, made.expansion.mlp_only_layers)
    fields = family_of(arch).moe.fields
    if "shared_expert_size" in fields:
        size = config.get(fields["shared_expert_size"][0])
        if type(size) is int and size >= 0:
            arch = replace(arch, shared_expert_size=size)
    return arch


def _shape(export: SafetensorsReader, name: str) -> tuple[int, ...] | None:
    """None where it cannot be read, which the census tells."""
    try:
        export.dtype(name)
        return export.shape(name)
    except UserError:
        return None


def _check_values(found: Scan, has_frozen: bool) -> list[Check]:
    changed = sum(found.trained.values())
    what = "new experts" if has_frozen else "trained"
    checks = [
        Check(name="values", ok=not found.wrong, detail=listed(found.wrong) or "all finite, none zeroed"),
        Check(name=what, ok=True, detail=f"{changed} of {len(found.trained)} tensors differ from the base model"),
    ]
    if has_frozen:
        same = len(found.frozen) - len(found.changed)
        detail = f"{same} of {len(found.frozen)} equal the base model's SHA-256"
        if found.changed:
            detail += f"; changed: {listed(found.changed)}"
        checks.append(Check(name="frozen tensors", ok=not found.changed, detail=detail))
    return checks
