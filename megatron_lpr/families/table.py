"""What a model family is: the transformers classes it reads and writes, and how each tensor maps, both ways.

Names in `Mapping.megatron` and `Mapping.hf` are relative: to the model, to a decoder layer, or to an FFN.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_lpr.families.mappings import Mapping

Shape = tuple[int, ...]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder in Hugging Face's numbers: dense, or already with experts (`num_experts` > 0).

    ffn_hidden_size: width of a dense FFN and of an expert alike.
    num_experts, topk: of the model that was read; what it is upcycled to is said where it is used.
    mlp_only_layers: layers (from 0) that have no experts, in the model that was read or in the upcycled one.
    shared_expert_size: width of the zero shared expert that the MoE class insists on.
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

    def shape(self, dims: str) -> Shape:
        """The shape that a string of dimension letters (`"VH"`, see mappings.py) stands for."""
        sizes = {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "F": self.ffn_hidden_size,
            "Q": self.num_attention_heads * self.head_dim,
            "K": self.num_query_groups * self.head_dim,
            "D": self.head_dim,
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
    """

    architecture: str
    model_type: str
    fields: dict[str, tuple[str, ...]] = field(default_factory=dict)
    required: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    rope_theta: float = 1e4


@dataclass(frozen=True, kw_only=True)
class MoEClass(HFClass):
    """A stock class with experts, and its names inside a decoder layer.

    expert: with {expert} and {weight} to fill in. weights: the dense FFN's weight -> its name in `expert`.
    zeros: tensors that the class has, the method has not, and that do nothing when they are zero (name -> dimensions).
    """

    router: str
    expert: str
    weights: dict[str, str]
    zeros: dict[str, str] = field(default_factory=dict)


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
    """One family: its dense class, its mappings (model, layer, FFN), and the stock MoE class it is exported to."""

    name: str
    dense: HFClass
    moe: MoEClass
    model: tuple[Mapping, ...]
    layer: tuple[Mapping, ...]
    ffn: tuple[Mapping, ...]

    def hf_class(self, num_experts: int) -> HFClass:
        return self.moe if num_experts else self.dense

    def has(self, megatron: str) -> bool:
        return any(mapping.megatron == megatron for mapping in self.layer)

    def ffn_name(self, layer: int, weight: str, expert: int | None) -> str:
        """The HF name of an FFN weight (`gate_proj.weight`), of the dense FFN or of an expert."""
        if expert is None:
            return f"model.layers.{layer}.mlp.{weight}"
        return f"model.layers.{layer}." + self.moe.expert.format(expert=expert, weight=self.moe.weights[weight])

    def find(self, role: str, megatron: str) -> Mapping:
        """The mapping of a parameter, by its role and relative name (`ParameterName`, names.py)."""
        table = {"model": self.model, "layer": self.layer}.get(role, self.ffn)
        found = next((mapping for mapping in table if mapping.megatron == megatron), None)
        assert found is not None, f"the {self.name} table has no {role} parameter '{megatron}'"
        return found

    def hf_names(self, mapping: Mapping, *, role: str, layer: int | None, expert: int | None = None) -> list[str]:
        """Full HF names of a mapping's tensors, of a dense layer or (with `expert`) of an expert."""
        if role == "model":
            return list(mapping.hf)
        if role == "layer":
            return [f"model.layers.{layer}.{name}" for name in mapping.hf]
        return [self.ffn_name(layer, name, expert) for name in mapping.hf]

    def router_name(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.moe.router}"

    def zero_shapes(self, arch: Architecture, num_experts: int) -> dict[str, Shape]:
        """Name and shape of the tensors on disk that are always zero."""
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
            for expert in range(num_experts) if has_experts else (None,):
                for mapping in self.ffn:
                    for name, dims in mapping.hf.items():
                        yield self.ffn_name(layer, name, expert), arch.shape(dims)
        yield from self.zero_shapes(arch, num_experts).items()
