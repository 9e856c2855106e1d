"""Is an export what it claims to be? Its names, its config, and every tensor against the base model."""

import hashlib
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_lpr.conversion.export_config import export_config
from megatron_lpr.conversion.families import Architecture, Family, family_of, read_architecture
from megatron_lpr.conversion.folders import COMPANION_FILES
from megatron_lpr.conversion.hf_config import read_config
from megatron_lpr.conversion.hf_io import SafetensorsReader, tensor_bytes, torch_dtype
from megatron_lpr.conversion.origins import Origin, check_experts, origins
from megatron_lpr.conversion.stock_class import stock_shapes
from megatron_lpr.conversion.upcycle import check_checkpoint
from megatron_lpr.errors import UserError

_NAMED_IN_REPORT = 5


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at: its name, whether it holds, and what was found."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:14} {self.detail}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All checks of one export. `str(report)` is one line per check; `ok` is the exit status.

    frozen_sha256: `frozen_digest` of the frozen tensors as they are in the export; empty for a dense export.
    """

    checks: tuple[Check, ...]
    frozen_sha256: str = ""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def frozen_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 (hex) over names, dtypes and bytes of named tensors, in whatever order they come."""
    return _digest_of_digests((name, _sha256(tensor)) for name, tensor in tensors)


def _sha256(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(str(tensor.dtype).encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _digest_of_digests(digests: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in sorted(digests)).encode()).hexdigest()


def verify_export(export_dir: str | Path, base_dir: str | Path, *, num_frozen: int = 1) -> VerifyReport:
    """Checks an export, MoE or dense, against the HF model it was made from, which may have experts itself.

    Frozen tensors (attention, norms, embeddings, experts 0..num_frozen-1) are compared by SHA-256 after
    casting the base's to the export's dtype, which is exact whenever that is at least as wide. A dense export
    has no frozen tensors, nor has one of which everything was trained (num_frozen=0): there the ones that differ from
    the base are counted. UserError when either folder cannot be read at all.
    """
    arch = read_architecture(base_dir)
    config = read_config(export_dir)
    base, export = SafetensorsReader(base_dir), SafetensorsReader(export_dir)
    check_checkpoint(base, arch)
    num_experts = _num_experts(config, family_of(arch), export_dir)
    has_frozen = num_experts > 0 and num_frozen > 0
    if has_frozen:
        if num_experts > arch.num_experts:  # expanded, and so are all of the base's experts frozen
            num_frozen = max(num_frozen, arch.num_experts)
        check_experts(num_experts=num_experts, num_frozen=num_frozen)
    arch = _as_exported(arch, config)
    shapes = family_of(arch).shapes(arch, num_experts)
    dtype = torch_dtype(config.get("dtype", "float32"))
    sound = [name for name, shape in shapes.items() if name in export and export.shape(name) == shape]
    scan = _scan(export, base, origins(arch, num_experts), sound, dtype, num_frozen if has_frozen else 0)
    return VerifyReport(
        checks=(
            _check_config(config, arch, read_config(base_dir), num_experts),
            _check_census("tensors", export, shapes, dtype),
            _check_census("stock class", export, stock_shapes(export_dir), None),
            *_check_values(scan, has_frozen),
            _check_companions(Path(export_dir), Path(base_dir)),
        ),
        frozen_sha256=_digest_of_digests(scan.frozen.items()) if has_frozen else "",
    )


def compare_tensors(export_dir: str | Path, expected: Iterable[tuple[str, torch.Tensor]]) -> Check:
    """Every tensor of an export against the tensor (name, value) that a checkpoint says it is, bit for bit.

    expected: in any order and of any floating dtype, cast to the export's as exporting does. What must be zero
    (`Family.zero_shapes`) is in no checkpoint, and is not looked at here.
    """
    export, arch = SafetensorsReader(export_dir), read_architecture(export_dir)
    unseen = set(export.keys()) - family_of(arch).zero_shapes(arch, arch.num_experts).keys()
    wrong = []
    for name, tensor in expected:
        if name not in unseen:
            wrong.append(f"{name} is not there")
            continue
        unseen.remove(name)
        if not _same_bits(export.get(name), tensor):
            wrong.append(name)
    wrong += [f"{name} is in no checkpoint" for name in sorted(unseen)]
    detail = f"{len(wrong)} tensors differ: {_listed(wrong)}" if wrong else "every tensor equals its own, bit for bit"
    return Check(name="checkpoint", ok=not wrong, detail=detail)


def _same_bits(there: torch.Tensor, expected: torch.Tensor) -> bool:
    """Also where `==` would not see it: in NaN and in the sign of zero."""
    expected = expected.detach().cpu().to(there.dtype)
    return there.shape == expected.shape and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (there, expected))
    )


def _num_experts(config: dict[str, Any], family: Family, export_dir: str | Path) -> int:
    name = (config.get("architectures") or ["none"])[0]
    if name == family.dense.architecture:
        return 0
    num_experts = config.get(family.moe.fields["num_experts"][0])
    if name != family.moe.architecture or not isinstance(num_experts, int) or num_experts < 1:
        raise UserError(
            f"'{export_dir}' is a {name} with {num_experts} experts; "
            f"an export of a {family.dense.architecture} is a {family.moe.architecture}, or dense again"
        )
    return num_experts


def _as_exported(arch: Architecture, config: dict[str, Any]) -> Architecture:
    """The base with what was chosen for the export: which layers stayed dense, how wide the zero shared expert is."""
    fields = family_of(arch).moe.fields
    if "shared_expert_size" in fields:
        size = config.get(fields["shared_expert_size"][0], arch.shared_expert_size)
        arch = replace(arch, shared_expert_size=size)
    if "mlp_only_layers" in fields:
        arch = replace(arch, mlp_only_layers=tuple(config.get("mlp_only_layers") or ()))
    return arch


class _Scan(NamedTuple):
    """What one pass over the tensors of an export found."""

    frozen: dict[str, str]  # SHA-256 by name
    changed: list[str]  # frozen, and not the base's
    trained: dict[str, bool]  # trained on from the base's: name -> differs from it
    wrong: list[str]  # what no tensor may be: not finite, zero where the base is not, not zero where it must be


def _scan(
    export: SafetensorsReader,
    base: SafetensorsReader,
    origins: dict[str, Origin],
    names: list[str],
    dtype: torch.dtype,
    num_frozen: int,
) -> _Scan:
    """On all cores: reading, hashing and comparing release the GIL. Each thread holds two tensors at a time."""
    found = _Scan({}, [], {}, [])

    def look(name: str) -> _Look:
        return _look(export.get(name), origins[name], base, dtype, num_frozen)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for name, seen in zip(names, threads.map(look, names), strict=True):
            found.wrong.extend(f"{name} is {what}" for what in seen.wrong)
            if seen.sha256 is not None:
                found.frozen[name] = seen.sha256
                if not seen.same:
                    found.changed.append(name)
            elif seen.same is not None:
                found.trained[name] = not seen.same
    return found


class _Look(NamedTuple):
    """What one tensor of an export is."""

    wrong: list[str]
    same: bool | None  # as the base's tensor that it was copied from; None: it was copied from none
    sha256: str | None  # of a frozen one


def _look(
    tensor: torch.Tensor, origin: Origin, base: SafetensorsReader, dtype: torch.dtype, num_frozen: int
) -> _Look:
    wrong = []
    # One reduction answers both questions: NaN and infinities reach the extremes.
    low, high = (extreme.item() for extreme in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        wrong.append("not finite")
    if origin.kind == "zeros" and not low == high == 0:
        wrong.append("not zero")
    if origin.kind != "copy":
        return _Look(wrong, None, None)
    expected = base.get(origin.base).to(dtype)
    if low == high == 0 and expected.any():
        wrong.append("all zero")
    is_frozen = num_frozen and (origin.expert is None or origin.expert < num_frozen)
    same = tensor.dtype == dtype and _same_bits(tensor, expected)
    return _Look(wrong, same, _sha256(tensor) if is_frozen else None)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED_IN_REPORT} more" if len(names) > _NAMED_IN_REPORT else ""
    return ", ".join(names[:_NAMED_IN_REPORT]) + more


def _check_config(config: dict[str, Any], arch: Architecture, base_config: dict[str, Any], num_experts: int) -> Check:
    topk = config.get("num_experts_per_tok", 0)
    expected = export_config(
        arch, base_config, num_experts=num_experts, topk=topk, dtype=config.get("dtype", "float32")
    )
    wrong = [
        f"{key} = {config.get(key)!r} (not {value!r})" for key, value in expected.items() if config.get(key) != value
    ]
    if num_experts and not 1 <= topk <= num_experts:
        wrong.append(f"num_experts_per_tok = {topk}")
    return Check(
        name="config",
        ok=not wrong,
        detail=_listed(wrong) or f"{len(expected)} fields follow from the base model",
    )


def _check_census(
    name: str, export: SafetensorsReader, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype | None
) -> Check:
    """Names and shapes, and with `dtype` dtypes as well."""
    keys = set(export.keys())
    problems = []
    if missing := [key for key in shapes if key not in keys]:
        problems.append(f"{len(missing)} missing: {_listed(missing)}")
    if unexpected := sorted(keys - shapes.keys()):
        problems.append(f"{len(unexpected)} unexpected: {_listed(unexpected)}")
    present = [key for key in shapes if key in keys]
    if misshapen := [f"{key} {export.shape(key)}" for key in present if export.shape(key) != shapes[key]]:
        problems.append(f"{len(misshapen)} of another shape: {_listed(misshapen)}")
    if dtype and (cast := [f"{key} {export.dtype(key)}" for key in present if export.dtype(key) != dtype]):
        problems.append(f"{len(cast)} of another dtype than the config says: {_listed(cast)}")
    return Check(name=name, ok=not problems, detail="; ".join(problems) or f"{len(shapes)} names and shapes agree")


def _check_values(scan: _Scan, has_frozen: bool) -> list[Check]:
    changed = sum(scan.trained.values())
    what = "new experts" if has_frozen else "trained"
    checks = [
        Check(name="values", ok=not scan.wrong, detail=_listed(scan.wrong) or "all finite, none zeroed"),
        Check(name=what, ok=True, detail=f"{changed} of {len(scan.trained)} tensors differ from the base model"),
    ]
    if has_frozen:
        same = len(scan.frozen) - len(scan.changed)
        detail = f"{same} of {len(scan.frozen)} equal the base model's SHA-256"
        if scan.changed:
            detail += f"; changed: {_listed(scan.changed)}"
        checks.append(Check(name="frozen tensors", ok=not scan.changed, detail=detail))
    return checks


def _check_companions(export_dir: Path, base_dir: Path) -> Check:
    there = [name for name in COMPANION_FILES if (base_dir / name).is_file()]
    differ = [
        name
        for name in there
        if not (export_dir / name).is_file() or (export_dir / name).read_bytes() != (base_dir / name).read_bytes()
    ]
    detail = (
        f"missing or different: {_listed(differ)}" if differ else f"{len(there)} tokenizer and generation files equal"
    )
    return Check(name="files", ok=not differ, detail=detail)
