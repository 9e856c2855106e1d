"""What to know before a conversion: the size of the model, and what is odd of one that works all the same."""

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_lpr.families import Architecture, family_of
from megatron_lpr.families.expansion import origins
from megatron_lpr.files.safetensors_io import torch_dtype

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
# Every number of the first is one of the second.
_EXACT = {("bfloat16", "float32"), ("float16", "float32")}
_ROW_BYTES = 16  # torch.nn.functional.grouped_mm refuses matrices whose rows do not start at a multiple


def model_bytes(arch: Architecture, num_experts: int, dtype: str) -> int:
    """Bytes of all tensors on disk of a model with `num_experts` experts (0: dense)."""
    shapes = family_of(arch).shapes(arch, num_experts)
    return sum(map(math.prod, shapes.values())) * torch_dtype(dtype).itemsize


def new_bytes(arch: Architecture, num_experts: int, num_frozen: int, dtype: str) -> int:
    """Bytes of what the base of a model with experts does not hold: routers and new experts."""
    shapes = family_of(arch).shapes(arch, num_experts)
    new = [name for name, origin in origins(arch, num_experts).items() if not origin.is_frozen(num_frozen)]
    return sum(math.prod(shapes[name]) for name in new) * torch_dtype(dtype).itemsize


def remarks(arch: Architecture, hf_dir: str | Path, *, dtype: str, num_experts: int) -> Iterator[str]:
    """Of a model with `num_experts` experts (0: dense) that is written in `dtype`, with the tokenizer of `hf_dir`."""
    yield from base_remarks(arch, hf_dir, dtype=dtype)
    moe = family_of(arch).moe
    if num_experts and not moe.any_head_dim and arch.shape("Q") != (arch.hidden_size,):
        yield (
            f"{arch.num_attention_heads} heads of {arch.head_dim} do not make up the hidden size, {arch.hidden_size}: "
            f"transformers 4 cannot load such a {moe.architecture}, and vLLM (0.32) would compute something else; "
            "transformers 5 can"
        )
    for name, size in (("expert width", arch.ffn_hidden_size), ("hidden size", arch.hidden_size)):
        row_bytes = size * torch_dtype(dtype).itemsize
        if num_experts and row_bytes % _ROW_BYTES:
            yield (
                f"the {name} {size} makes rows of {row_bytes} bytes in {dtype}, no multiple of {_ROW_BYTES}: "
                "transformers' default kernel (grouped_mm) cannot run the export; load it with "
                "from_pretrained(..., experts_implementation='eager')"
            )


def base_remarks(arch: Architecture, hf_dir: str | Path, *, dtype: str) -> Iterator[str]:
    """Of the base model alone, whose weights become `dtype`."""
    if not any((Path(hf_dir) / name).is_file() for name in _TOKENIZER_FILES):
        yield (
            f"'{hf_dir}' holds no tokenizer ({', '.join(_TOKENIZER_FILES)}), and so will no export of it: copy the "
            "tokenizer of the model there"
        )
    if dtype != arch.dtype and (arch.dtype, dtype) not in _EXACT:
        exact = " or ".join(dict.fromkeys(("float32", arch.dtype)))
        yield (
            f"'{hf_dir}' is {arch.dtype} and {dtype} cannot hold all of its numbers: frozen tensors are the base's "
            f"rounded, not its very numbers; {exact} keeps them"
        )
