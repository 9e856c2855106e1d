"""The parameters of one rank, in the order in which its modules have them, from numbers alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lpr.families import Architecture
from megatron_lpr.families.table import EMBEDDING, OUTPUT_LAYER
from megatron_lpr.model.parameters import is_trainable, padded_vocab_size
from megatron_lpr.model.rank.place import Group, Place
from megatron_lpr.recipe.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One of a rank's parameters: its own slice of the whole one.

    copies: the group whose ranks hold the same slice; gradients are summed over it.
    whole: each tensor-parallel rank holds all of it, of that parallelism which is outside the experts.
    twin: it is one of the two copies of a tied embedding, on the first and the last pipeline stage.
    """

    name: str
    rows: int
    columns: int = 1
    learns: bool
    copies: Group = "data"
    whole: bool = False
    twin: bool = False

    @property
    def elements(self) -> int:
        return self.rows * self.columns


def parameters(recipe: Recipe, arch: Architecture, place: Place) -> list[list[Parameter]]:
    """Of each model chunk of a rank."""
    chunks = place.chunks(arch)
    return [
        list(
            _chunk(
                recipe,
                arch,
                layers,
                embeds=place.is_first and number == 0,
                predicts=place.is_last and number == len(chunks) - 1,
            )
        )
        for number, layers in enumerate(chunks)
    ]


def _chunk(recipe: Recipe, arch: Architecture, layers: range, *, embeds: bool, predicts: bool) -> Iterator[Parameter]:
    policy = recipe.train.trainable if recipe.train else None  # None: nothing learns
    tensor, hidden, tied = recipe.parallel.tensor, arch.hidden_size, arch.tie_word_embeddings
    vocabulary = padded_vocab_size(arch.vocab_size, tensor) // tensor
    everything = policy == "all"
    if embeds:
        twin = tied and not predicts
        yield Parameter(name=EMBEDDING, rows=vocabulary, columns=hidden, learns=everything, twin=twin)
    for layer in layers:
        for name, rows, columns, copies in _layer(recipe, arch, has_experts=layer in arch.moe_layers()):
            name = f"decoder.layers.{layer}.{name}"
            yield Parameter(
                name=name,
                rows=rows,
                columns=columns,
                learns=policy is not None and is_trainable(name, policy),
                copies=copies,
                whole=any(part in name for part in ("layernorm", ".router.", ".frozen_experts."))
                and not (arch.qk_norm_across_heads and name.endswith(("q_layernorm.weight", "k_layernorm.weight"))),
            )
    if predicts:
        yield Parameter(name="decoder.final_layernorm.weight", rows=hidden, learns=everything, whole=True)
        if not tied or not embeds:
            yield Parameter(name=OUTPUT_LAYER, rows=vocabulary, columns=hidden, learns=everything, twin=tied)


def _layer(recipe: Recipe, arch: Architecture, *, has_experts: bool) -> Iterator[tuple[str, int, int, Group]]:
    """Name inside the layer, rows, columns, and the group of its copies."""
    sizes, hidden = recipe.parallel, arch.hidden_size
    queries, keys = arch.shape("QK")
    if not arch.norm_after:
        yield "input_layernorm.weight", hidden, 1, "data"
    yield "self_attention.linear_proj.weight", hidden, queries // sizes.tensor, "data"
    yield "self_attention.linear_qkv.weight", (queries + 2 * keys) // sizes.tensor, hidden, "data"
    if arch.qkv_bias:
        yield "self_attention.linear_qkv.bias", (queries + 2 * keys) // sizes.tensor, 1, "data"
    if arch.qk_norm:
        own = (queries // sizes.tensor, keys // sizes.tensor) if arch.qk_norm_across_heads else 2 * (arch.head_dim,)
        yield "self_attention.q_layernorm.weight", own[0], 1, "data"
        yield "self_attention.k_layernorm.weight", own[1], 1, "data"
    if arch.norm_after:
        yield "self_attn_bda.layernorm.weight", hidden, 1, "data"
    else:
        yield "pre_mlp_layernorm.weight", hidden, 1, "data"
    yield from _ffn(recipe, arch, has_experts=has_experts)
    if arch.norm_after:
        yield "mlp_bda.layernorm.weight", hidden, 1, "data"


def _ffn(recipe: Recipe, arch: Architecture, *, has_experts: bool) -> Iterator[tuple[str, int, int, Group]]:
    model, sizes, hidden = recipe.model, recipe.parallel, arch.hidden_size
    if not model.num_experts or not has_experts:
        width = arch.ffn_hidden_size // sizes.tensor
        yield "mlp.linear_fc1.weight", 2 * width, hidden, "data"
        yield "mlp.linear_fc2.weight", hidden, width, "data"
        return
    yield "mlp.router.weight", model.num_experts, hidden, "data"
    width = arch.ffn_hidden_size // sizes.expert_tensor
    for expert in range((model.num_experts - model.num_frozen_experts) // sizes.expert):
        yield f"mlp.experts.local_experts.{expert}.linear_fc1.weight", 2 * width, hidden, "expert_data"
        yield f"mlp.experts.local_experts.{expert}.linear_fc2.weight", hidden, width, "expert_data"
    for expert in range(model.num_frozen_experts):
        yield f"mlp.frozen_experts.{expert}.linear_fc1.weight", 2 * arch.ffn_hidden_size, hidden, "frozen"
        yield f"mlp.frozen_experts.{expert}.linear_fc2.weight", hidden, arch.ffn_hidden_size, "frozen"
