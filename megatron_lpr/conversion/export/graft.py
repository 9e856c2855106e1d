"""Delta grafting (arXiv 2605.18083): what instruction tuning did to the base, added to the expanded base.

    grafted = expanded + (instruct - base)       once in attention, embeddings and norms, and in every expert's FFN

The router has no delta, for neither dense model has one. A tensor that was frozen is still the base's, so that its
sum is the instruct model's tensor: those bytes are written, and the frozen expert is exactly the instruct FFN.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megatron_lpr.conversion.export.sources import HFTensors, Source, TrainedModel
from megatron_lpr.conversion.record import Made
from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, read_architecture
from megatron_lpr.families.expansion import Origin, origins
from megatron_lpr.families.weights import open_weights
from megatron_lpr.files.file_tensor import FileTensor
from megatron_lpr.files.safetensors_io import SafetensorsReader, torch_dtype
from megatron_lpr.model.load.upcycle import check_checkpoint

# What may differ between a base and its instruct model without another meaning of the same weights.
_MAY_DIFFER = {"dtype", "max_position_embeddings"}
# Of a tokenizer.json: what decides which ids a text becomes. Templates and post-processing are instruct's own.
_SAME_IDS = ("model", "normalizer", "pre_tokenizer")
_ROWS = 2**24  # elements of fp32 arithmetic at a time


def grafted(
    model: TrainedModel, made: Made, graft_delta: Sequence[str | Path], *, base_dir: str | Path, dtype: str
) -> TrainedModel:
    """The model with INSTRUCT - BASE added, of `graft_delta`; it has INSTRUCT's config, tokenizer and frozen tensors.

    base_dir: the HF model that training started from. dtype: of the export. UserError when they do not fit.
    """
    base, instruct = map(Path, graft_delta)
    check_own_base(base, base_dir)
    source = GraftedSource(model.source, model.arch, made, base_dir=base, instruct_dir=instruct, dtype=dtype)
    theirs = read_architecture(instruct)
    arch = replace(model.arch, max_position_embeddings=theirs.max_position_embeddings, dtype=theirs.dtype)
    return TrainedModel(arch=arch, hf_dir=instruct, source=source)


class GraftedSource:
    """A source of the expanded `base_dir` whose tensors leave it with `instruct_dir - base_dir` added.

    arch: of the export. made: what was made of the base. dtype: that the export is written in. UserError where the two
    models do not fit, and, as soon as it shows, where a frozen tensor is not the base's.
    """

    def __init__(
        self,
        source: Source,
        arch: Architecture,
        made: Made,
        *,
        base_dir: str | Path,
        instruct_dir: str | Path,
        dtype: str,
    ):
        check_pair(base_dir, instruct_dir)
        self._source, self.units = source, source.units
        self._base, self._instruct = open_weights(base_dir, arch), open_weights(instruct_dir, arch)
        self._origins = origins(arch, made.expansion.num_experts)
        self._num_frozen, self._dtype = made.untouched, torch_dtype(dtype)

    def stream(self, units: Iterable[str]) -> HFTensors:
        for name, tensor in self._source.stream(units):
            yield name, self._graft(name, tensor, self._origins[name])

    def _graft(self, name: str, tensor: torch.Tensor | FileTensor, origin: Origin) -> torch.Tensor:
        if isinstance(tensor, FileTensor):
            tensor = tensor[:]
        if origin.kind != "copy":
            return tensor
        base, instruct = self._base.get(origin.copied), self._instruct.get(origin.copied)
        if not origin.is_frozen(self._num_frozen):
            return add_delta(tensor, base, instruct, self._dtype)
        if not torch.equal(tensor, base.to(tensor.dtype)):
            raise UserError(
                f"'{self._base.folder}' is not the base of this model: the frozen tensor '{name}' is not its "
                f"'{origin.base}'; give --graft-delta the model that was expanded"
            )
        return instruct


def add_delta(tensor: torch.Tensor, base: torch.Tensor, instruct: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor + (instruct - base), computed in fp32 and rounded once, to `dtype`."""
    result = torch.empty(tensor.shape, dtype=dtype)
    parts = [t.reshape(-1).split(_ROWS) for t in (result, tensor, base, instruct)]
    for out, expanded, old, new in zip(*parts, strict=True):
        out.copy_(expanded.float() + (new.float() - old.float()))
    return result


def check_pair(base_dir: str | Path, instruct_dir: str | Path) -> None:
    """UserError unless the two are the same architecture, tensor by tensor, with the same vocabulary."""
    base, instruct = read_architecture(base_dir), read_architecture(instruct_dir)
    differ = [
        f"{key} ({value} and {asdict(instruct)[key]})"
        for key, value in asdict(base).items()
        if key not in _MAY_DIFFER and asdict(instruct)[key] != value
    ]
    if differ:
        raise UserError(f"--graft-delta: '{base_dir}' and '{instruct_dir}' are different models: {', '.join(differ)}")
    for folder, arch in ((base_dir, base), (instruct_dir, instruct)):
        check_checkpoint(open_weights(folder, arch), arch)
    if _vocabulary(base_dir) != _vocabulary(instruct_dir):
        raise UserError(
            f"--graft-delta: the tokenizers of '{base_dir}' and '{instruct_dir}' give other ids to the same text"
        )


def check_own_base(base_dir: str | Path, model_base: str | Path) -> None:
    """UserError unless `base_dir` holds the same weights as the base that the model was made from."""
    if Path(base_dir).resolve() == Path(model_base).resolve():
        return
    given, own = SafetensorsReader(base_dir), SafetensorsReader(model_base)
    names = set(given.keys())
    if names == set(own.keys()) and all(torch.equal(given.get(name), own.get(name)) for name in sorted(names)):
        return
    raise UserError(
        f"--graft-delta: '{base_dir}' is not the base of this model, which is '{model_base}': their weights differ"
    )


def _vocabulary(folder: str | Path) -> object:
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        names = ("tokenizer.model", "vocab.json", "merges.txt")
        return [(Path(folder) / name).read_bytes() for name in names if (Path(folder) / name).is_file()]
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON ({error}): download the model again") from error
    added = {token["id"]: token["content"] for token in tree.get("added_tokens") or ()}
    return [added, *(tree.get(key) for key in _SAME_IDS)]
