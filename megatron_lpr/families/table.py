"""What a model family is: the transformers classes it reads and writes, and how each tensor maps, both ways.

Names in `Mapping.megatron` and `Mapping.hf` are relative: to the model, to a decoder layer, or to an FFN.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_lpr.families.mappings import QKV, Copy, GateUp, Mapping, ParameterName
from megatron_lpr.files.file_tensor import Shape

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

# What all families have alike: embedding, last norm and head; a layer's attention and norms; an FFN.
MODEL = (
    Mapping(EMBEDDING, Copy(split=0, padded=True), {"model.embed_tokens.weight": "VH"}),
    Mapping("decoder.final_layernorm.weight", Copy(), {"model.norm.weight": "H"}),
    Mapping(OUTPUT_LAYER, Copy(split=0, padded=True), {"lm_head.weight": "VH"}),
)
LAYER = (
    Mapping("input_layernorm.weight", Copy(), {"input_layernorm.weight": "H"}),
    Mapping(
        "self_attention.linear_qkv.weight",
        QKV(),
        {"self_attn.q_proj.weight": "QH", "self_attn.k_proj.weight": "KH", "self_attn.v_proj.weight": "KH"},
    ),
    Mapping("self_attention.linear_proj.weight", Copy(split=1), {"self_attn.o_proj.weight": "HQ"}),
    Mapping("pre_mlp_layernorm.weight", Copy(), {"post_attention_layernorm.weight": "H"}),
)
FFN = (
    Mapping("linear_fc1.weight", GateUp(), {"gate_proj.weight": "FH", "up_proj.weight": "FH"}),
    Mapping("linear_fc2.weight", Copy(split=1), {"down_proj.weight": "HF"}),
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder in Hugging Face's numbers: dense, or already with experts (`num_experts` > 0).

    ffn_hidden_size: width of a dense FFN and of an expert alike.
    num_experts, topk: of the model that was read; what it is upcycled to is said where it is used.
    mlp_only_layers: layers (from 0) that have no experts, in the model that was read or in the upcycled one.
    shared_expert_size: width of the zero shared expert that the MoE class insists on.
    rope_interleaved: RoPE turns channels side by side, not those of a head's two halves.
    qk_norm_across_heads: q and k are normed over all heads at once, not each head by itself.
    norm_after: what leaves attention and FFN is normed, not what enters them.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None
    dtype: str
    num_experts: int = 0
    topk: int = 0
    mlp_only_layers: tuple[int, ...] = ()
    shared_expert_size: int = 0
    rope_interleaved: bool = False
    qk_norm_across_heads: bool = False
    norm_after: bool = False

    def shape(self, dims: str) -> Shape:
        """The shape that a string of dimension letters (`"VH"`, see mappings.py) stands for."""
        sizes = {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "F": self.ffn_hidden_size,
            "Q": self.num_attention_heads * self.head_dim,
            "K": self.num_query_groups * self.head_dim,
            "D": self.head_dim,
            "E": self.num_experts,
            "S": self.shared_expert_size,
            "1": 1,
        }
        return tuple(sizes[letter] for letter in dims)

    def moe_layers(self) -> list[int]:
        """The layers that have experts, or get them."""
        return [layer for layer in range(self.num_layers) if layer not in self.mlp_only_layers]


@dataclass(frozen=True, kw_only=True)
class HFClass:
    """A transformers class and its config.json.

    fields: attribute of `Architecture` -> the config fields that say it, beside those that every class has
        (`FIELDS`). The first one found is read; all are written.
    required: values that alone can be carried. They are written too, but for None, which means absent.
    defaults, rope_theta: what transformers assumes for a field that config.json leaves out.
    joined: a layer's tensor on disk -> those of the mappings whose rows it holds, one after the other (weights.py).
    """

    architecture: str
    model_type: str
    fields: dict[str, tuple[str, ...]] = field(default_factory=dict)
    required: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    rope_theta: float = 1e4
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MoEClass(HFClass):
    """A stock class with experts, and its names inside a decoder layer.

    expert: with {expert} and {weight} to fill in. weights: a dense FFN's weight -> its name in `expert`, where it has
        another.
    zeros: tensors that the class has, the method has not, and that do nothing when they are zero (name -> dimensions).
    any_head_dim: whether heads that do not make up the hidden size can be loaded by transformers 4 too.
    """

    router: str = "mlp.gate.weight"
    expert: str = "mlp.experts.{expert}.{weight}"
    weights: dict[str, str] = field(default_factory=dict)
    zeros: dict[str, str] = field(default_factory=dict)
    any_head_dim: bool = True


# What every class calls the same, beside the RoPE fields and the dtype.
FIELDS = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings",),
    "rms_norm_eps": ("rms_norm_eps",),
    "tie_word_embeddings": ("tie_word_embeddings",),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: its dense class, its mappings (model, layer, FFN), and the stock MoE class it is exported to.

    dense_again: the class of a dense export; None: the dense class, as long as that joins no tensors.
    """

    name: str
    dense: HFClass
    moe: MoEClass
    dense_again: HFClass | None = None
    rope_interleaved: bool = False
    model: tuple[Mapping, ...] = MODEL
    layer: tuple[Mapping, ...] = LAYER
    ffn: tuple[Mapping, ...] = FFN

    def hf_class(self, num_experts: int) -> HFClass:
        """Of an export."""
        return self.moe if num_experts else self.dense_again or self.dense

    def has(self, megatron: str, of: str | None = None) -> bool:
        """Whether layers have this parameter; of: made of one tensor of these dimensions."""
        return any(m.megatron == megatron and of in (None, *m.hf.values()) for m in self.layer)

    def mapping(self, name: ParameterName) -> Mapping | None:
        """Of a Megatron parameter other than a router; None for one that the family does not have."""
        table = {"model": self.model, "layer": self.layer}.get(name.role, self.ffn)
        return next((mapping for mapping in table if mapping.megatron == name.weight), None)

    def hf_names(self, name: ParameterName, expert: int | None = None) -> list[str]:
        """The HF tensors that a Megatron parameter is made of; none for one that the family does not have.

        expert: whose FFN is meant, in the HF model's count; None: the dense one.
        """
        if name.role == "router":
            return [self.router_name(name.layer)] if name.layer is not None else []
        mapping = self.mapping(name)
        if mapping is None or name.layer is None:
            return list(mapping.hf) if mapping else []
        if name.role == "layer":
            return [f"model.layers.{name.layer}.{weight}" for weight in mapping.hf]
        return [self.ffn_name(name.layer, weight, expert) for weight in mapping.hf]

    def ffn_name(self, layer: int, weight: str, expert: int | None) -> str:
        """The HF name of an FFN weight (`gate_proj.weight`), of the dense FFN or of an expert."""
        if expert is None:
            return f"model.layers.{layer}.mlp.{weight}"
        weight = self.moe.weights.get(weight, weight)
        return f"model.layers.{layer}." + self.moe.expert.format(expert=expert, weight=weight)

    def router_name(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.moe.router}"

    def zero_shapes(self, arch: Architecture, num_experts: int) -> dict[str, Shape]:
        """Name and shape of the tensors on disk that are always zero."""
        arch = replace(arch, num_experts=num_experts)
        return {
            f"model.layers.{layer}.{name}": arch.shape(dims)
            for layer in (arch.moe_layers() if num_experts else ())
            for name, dims in self.moe.zeros.items()
            if 0 not in arch.shape(dims)  # a shared expert of width 0 has no tensors
        }

    def shapes(self, arch: Architecture, num_experts: int = 0) -> dict[str, Shape]:
        """Name and shape of every tensor on disk, of the dense model or of the MoE class, in file order."""
        return dict(self._shapes(arch, num_experts))

    def _shapes(self, arch: Architecture, num_experts: int) -> Iterator[tuple[str, Shape]]:
        for mapping in self.model:
            if not (arch.tie_word_embeddings and mapping.megatron == OUTPUT_LAYER):
                yield from ((name, arch.shape(dims)) for name, dims in mapping.hf.items())
        for layer in range(arch.num_layers):
            for mapping in self.layer:
                for name, dims in mapping.hf.items():
                    yield f"model.layers.{layer}.{name}", arch.shape(dims)
            has_experts = num_experts and layer not in arch.mlp_only_layers
            if has_experts:
                yield self.router_name(layer), (num_experts, arch.hidden_size)
            experts: Sequence[int | None] = range(num_experts) if has_experts else (None,)
            for expert in experts:
                for mapping in self.ffn:
                    for name, dims in mapping.hf.items():
                        yield self.ffn_name(layer, name, expert), arch.shape(dims)
        yield from self.zero_shapes(arch, num_experts).items()
