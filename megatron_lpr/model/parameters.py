"""Which parameters a model has, and which of them learn. Needs no Megatron.

Frozen ones get no gradient buffer, no optimizer state and no weight gradient.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from megatron_lpr.families import Architecture
from megatron_lpr.families.table import EMBEDDING, OUTPUT_LAYER
from megatron_lpr.files.safetensors_io import torch_dtype

POLICIES: dict[str, Callable[[str], bool]] = {
    "new_experts_and_routers": lambda name: ".mlp.router." in name or ".mlp.experts." in name,
    "routers": lambda name: ".mlp.router." in name,
    "all": lambda name: True,
}
VOCAB_DIVISOR = 128


def freeze(chunks: Iterable[torch.nn.Module], trainable: str | None) -> None:
    """Set `requires_grad` of all parameters by the policy (None: none learns), before Megatron's DDP is around them."""
    learns = POLICIES[trainable] if trainable else lambda name: False
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(learns(name))


def is_trainable(name: str, trainable: str) -> bool:
    """Whether the policy lets the parameter of this (global) name learn."""
    return POLICIES[trainable](name)


def itemsize(name: str, dtype: str) -> int:
    """Bytes of a number of the parameter of this name in a model of this dtype: a router's are fp32 in every model."""
    return 4 if POLICIES["routers"](name) else torch_dtype(dtype).itemsize


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds whole, aligned rows."""
    multiple = VOCAB_DIVISOR * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def parameter_sizes(
    arch: Architecture, *, num_experts: int, num_frozen: int, vocab_size: int
) -> Iterator[tuple[str, int]]:
    """Name and elements of every parameter of the whole model; the new experts of a layer are one.

    Args:
        num_experts: of each layer that has experts, frozen ones included; 0: dense.
        vocab_size: rows of the embedding, padding included.
    """
    hidden, ffn = arch.hidden_size, 3 * arch.hidden_size * arch.ffn_hidden_size
    queries, keys = arch.shape("QK")
    yield EMBEDDING, vocab_size * hidden
    for number in range(arch.num_layers):
        layer = f"decoder.layers.{number}."
        yield layer + "self_attention.linear_qkv.weight", (queries + 2 * keys) * hidden
        yield layer + "self_attention.linear_proj.weight", queries * hidden
        if arch.qkv_bias:
            yield layer + "self_attention.linear_qkv.bias", queries + 2 * keys
        if arch.qk_norm:
            channels = queries + keys if arch.qk_norm_across_heads else 2 * arch.head_dim
            yield layer + "self_attention.q_and_k_layernorm.weight", channels
        yield layer + "layernorms.weight", 2 * hidden
        if not num_experts or number in arch.mlp_only_layers:
            yield layer + "mlp.weight", ffn
            continue
        yield layer + "mlp.router.weight", num_experts * hidden
        yield layer + "mlp.frozen_experts.weight", num_frozen * ffn
        yield layer + "mlp.experts.weight", (num_experts - num_frozen) * ffn
    yield "decoder.final_layernorm.weight", hidden
    if not arch.tie_word_embeddings:
        yield OUTPUT_LAYER, vocab_size * hidden
