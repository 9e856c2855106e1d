"""The tensors of an export, one by one: against the base model, and against what a checkpoint says they are."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_lpr.conversion.export.graft import grafted
from megatron_lpr.conversion.export.sources import Source, trained_model
from megatron_lpr.conversion.record import Made
from megatron_lpr.conversion.verify.report import Check, listed
from megatron_lpr.errors import UserError
from megatron_lpr.families import family_of, read_architecture
from megatron_lpr.families.expansion import Origin
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.files.cores import usable_cores
from megatron_lpr.files.file_tensor import FileTensor, equal_bytes, same_bits, tensor_bytes
from megatron_lpr.files.safetensors_io import SafetensorsReader
from megatron_lpr.reporting.progress import byte_progress


def digest_of_digests(digests: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hex) over names and SHA-256s of tensors, in whatever order they come."""
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in sorted(digests)).encode()).hexdigest()


def compare_with_checkpoint(
    checkpoint: Path,
    made: Made,
    export_dir: str | Path,
    base_dir: str | Path,
    *,
    load: str | None = None,
    graft_delta: Sequence[str | Path] | None = None,
) -> Check:
    """Every tensor of an export against the checkpoint's, with the delta added again where it was grafted.

    load: where the checkpoint that its run started from may be now.
    UserError when the checkpoint, the base and the models of the delta do not fit; what is wrong with the export itself
    fails the check.
    """
    config = read_config(export_dir)
    field = family_of(read_architecture(base_dir)).moe.fields.get("shared_expert_size", ("",))[0]
    width = config.get(field) if made.expansion.num_experts else None
    size = width if type(width) is int and width >= 0 else None
    model = trained_model(checkpoint, made, base_dir=base_dir, shared_expert_size=size, load=load)
    if graft_delta:
        model = grafted(model, made, graft_delta, base_dir=base_dir, dtype=config.get("dtype", "float32"))
    try:
        return compare_tensors(SafetensorsReader(export_dir), model.source)
    except UserError as error:
        return Check(name="checkpoint", ok=False, detail=str(error))


def compare_tensors(export: SafetensorsReader, source: Source) -> Check:
    """Every tensor of an export against the same one of `source`, bit for bit, cast to the export's dtype.

    On up to 8 cores, each with one parameter of the source; what is still on disk is compared in blocks.
    """
    unseen = set(export.keys())

    def differing(unit: str) -> list[str]:
        return [what for name, tensor in source.stream([unit]) if (what := _difference(export, name, tensor))]

    with _all_cores(at_most=8) as threads:
        wrong = [what for found in threads.map(differing, source.units) for what in found]
    unseen -= {name for names in source.units.values() for name in names}
    wrong += [f"{name} is in no checkpoint" for name in sorted(unseen)]
    detail = f"{len(wrong)} tensors differ: {listed(wrong)}" if wrong else "every tensor equals its own, bit for bit"
    return Check(name="checkpoint", ok=not wrong, detail=detail)


def _difference(export: SafetensorsReader, name: str, expected: torch.Tensor | FileTensor) -> str | None:
    """What is wrong with a tensor of an export; None: nothing."""
    if name not in export:
        return f"{name} is not there"
    there = export.slice(name)
    if there.shape != tuple(expected.shape):
        return f"{name} has shape {list(there.shape)}"
    return None if same_bits(there, expected) else name


def _all_cores(at_most: int = 64) -> ThreadPoolExecutor:
    """Reading, hashing and comparing release the GIL."""
    return ThreadPoolExecutor(min(usable_cores(), at_most))


class Scan(NamedTuple):
    """What one pass over the tensors of an export found."""

    frozen: dict[str, str]  # SHA-256 by name
    changed: list[str]  # frozen, and not the base's
    trained: dict[str, bool]  # trained on from the base's: name -> differs from it
    wrong: list[str]  # what no tensor may be: not finite, zero where the base is not, not zero where it must be


def scan(
    export: SafetensorsReader,
    base: SafetensorsReader,
    origins: dict[str, Origin],
    names: list[str],
    dtypes: Sequence[torch.dtype],
    num_frozen: int,
    progress: bool = False,
) -> Scan:
    """Looks at the tensors `names` on all cores, a block of each tensor and of its base at a time.

    dtypes: what the base's tensors were cast to, one after the other; the last is the export's.
    progress: show a bar.
    """
    found = Scan({}, [], {}, [])
    sizes = {name: math.prod(export.shape(name)) * dtypes[-1].itemsize for name in names}

    def look(name: str) -> _Look:
        try:
            return _look(export.slice(name), origins[name], base, dtypes, num_frozen)
        except UserError as error:
            return _Look([f"not readable ({error})"], None, None)

    with _all_cores() as threads, byte_progress("verify", sum(sizes.values()), show=progress) as bar:
        for name, seen in zip(names, threads.map(look, names), strict=True):
            bar.update(sizes[name])
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
    there: FileTensor, origin: Origin, base: SafetensorsReader, dtypes: Sequence[torch.dtype], num_frozen: int
) -> _Look:
    is_frozen = origin.is_frozen(num_frozen)
    expected = base.slice(origin.copied) if origin.kind == "copy" else None
    digest = hashlib.sha256(str(there.dtype).encode())
    finite, zero, base_zero, same = True, True, True, there.dtype == dtypes[-1]
    for place in there.blocks():
        block = there.narrow(0, *place)
        # One reduction answers both questions: NaN and infinities reach the extremes.
        low, high = (extreme.item() for extreme in block.aminmax())
        finite = finite and math.isfinite(low) and math.isfinite(high)
        zero = zero and low == high == 0
        if is_frozen:
            digest.update(tensor_bytes(block))
        if expected is not None:
            original = expected.narrow(0, *place)
            for dtype in dtypes:
                original = original.to(dtype)
            same = same and equal_bytes(block, original)
            base_zero = base_zero and not (zero and original.any())
    wrong = [] if finite else ["not finite"]
    if origin.kind == "zeros" and not zero:
        wrong.append("not zero")
    if expected is not None and zero and not base_zero:
        wrong.append("all zero")
    return _Look(wrong, same if expected is not None else None, digest.hexdigest() if is_frozen else None)
