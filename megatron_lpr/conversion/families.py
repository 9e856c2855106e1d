"""Model families: what each is called and how each tensor maps, in tables, both ways.

A family is one `Family` entry: the HF class it reads, its mappings (model, layer, FFN), the config values it
can carry, and the stock MoE class it is exported to. Nothing else in the package knows an HF tensor name.

Names in `Mapping.megatron` and `Mapping.hf` are relative: to the model, to a decoder layer, or to an FFN.
Dimension letters are those of mappings.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lpr.conversion.hf_config import read_config, read_rope
from megatron_lpr.conversion.mappings import QKV, Copy, GateUp, Mapping
from megatron_lpr.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense decoder, in Hugging Face's numbers."""

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

    def shape(self, dims: str) -> Shape:
        """The shape that a string of dimension letters (`"VH"`) stands for."""
        sizes = {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "F": self.ffn_hidden_size,
            "Q": self.num_attention_heads * self.head_dim,
            "K": self.num_query_groups * self.head_dim,
            "D": self.head_dim,
        }
        return tuple(sizes[letter] for letter in dims)


@dataclass(frozen=True, kw_only=True)
class MoEClass:
    """A stock HF class with experts: its names inside a decoder layer, and the config fields of its own."""

    architecture: str
    model_type: str
    router: str
    expert: str  # with {expert} and {weight} to fill in
    weights: dict[str, str]  # the dense FFN's weight -> its name in `expert`
    config: dict[str, Any] = field(default_factory=dict)
    num_experts_fields: tuple[str, ...] = ("num_local_experts",)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of dense decoders.

    required: config fields that must have this value, because nothing here can carry another.
    defaults, rope_theta: what HF assumes for a field that config.json leaves out.
    """

    name: str
    architecture: str
    model: tuple[Mapping, ...]
    layer: tuple[Mapping, ...]
    ffn: tuple[Mapping, ...]
    moe: MoEClass
    required: dict[str, Any]
    defaults: dict[str, Any]
    rope_theta: float = 1e4

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
            if num_experts:
                yield self.router_name(layer), (num_experts, arch.hidden_size)
            for expert in range(num_experts) if num_experts else (None,):
                for mapping in self.ffn:
                    for name, dims in mapping.hf.items():
                        yield self.ffn_name(layer, name, expert), arch.shape(dims)


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

LLAMA_MODEL = (
    Mapping(EMBEDDING, Copy(split=0, padded=True), {"model.embed_tokens.weight": "VH"}),
    Mapping("decoder.final_layernorm.weight", Copy(), {"model.norm.weight": "H"}),
    Mapping(OUTPUT_LAYER, Copy(split=0, padded=True), {"lm_head.weight": "VH"}),
)
LLAMA_LAYER = (
    Mapping("input_layernorm.weight", Copy(), {"input_layernorm.weight": "H"}),
    Mapping(
        "self_attention.linear_qkv.weight",
        QKV(),
        {"self_attn.q_proj.weight": "QH", "self_attn.k_proj.weight": "KH", "self_attn.v_proj.weight": "KH"},
    ),
    Mapping("self_attention.linear_proj.weight", Copy(split=1), {"self_attn.o_proj.weight": "HQ"}),
    Mapping("pre_mlp_layernorm.weight", Copy(), {"post_attention_layernorm.weight": "H"}),
)
LLAMA_FFN = (
    Mapping("linear_fc1.weight", GateUp(), {"gate_proj.weight": "FH", "up_proj.weight": "FH"}),
    Mapping("linear_fc2.weight", Copy(split=1), {"down_proj.weight": "HF"}),
)
MIXTRAL = MoEClass(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    router="block_sparse_moe.gate.weight",
    expert="block_sparse_moe.experts.{expert}.{weight}",
    weights={"gate_proj.weight": "w1.weight", "up_proj.weight": "w3.weight", "down_proj.weight": "w2.weight"},
    config={"router_jitter_noise": 0.0, "output_router_logits": False, "sliding_window": None},
)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            model=LLAMA_MODEL,
            layer=LLAMA_LAYER,
            ffn=LLAMA_FFN,
            moe=MIXTRAL,
            required={
                "attention_bias": False,
                "mlp_bias": False,
                "hidden_act": "silu",
                "sliding_window": None,
                "quantization_config": None,
            },
            defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        ),
        Family(
            name="mistral",
            architecture="MistralForCausalLM",
            model=LLAMA_MODEL,
            layer=LLAMA_LAYER,
            ffn=LLAMA_FFN,
            moe=MIXTRAL,
            required={"sliding_window": None, "hidden_act": "silu", "quantization_config": None},
            defaults={
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-6,
                "sliding_window": 4096,
                "num_key_value_heads": 8,
            },
        ),
    )
}


def family_of(arch: Architecture) -> Family:
    return FAMILIES[arch.family]


def read_architecture(hf_dir: str | Path) -> Architecture:
    """The architecture of a dense HF model folder.

    UserError: no folder, no config.json, an architecture that is not supported (the supported ones are
    named), a field that is missing, or a feature that the family cannot carry.
    """
    config = read_config(hf_dir)
    names = config.get("architectures") or ["none"]
    family = next((family for family in FAMILIES.values() if family.architecture == names[0]), None)
    if family is None:
        supported = ", ".join(family.architecture for family in FAMILIES.values())
        raise UserError(f"'{hf_dir}' is a {names[0]}, which is not supported; supported: {supported}")
    theta, scaling = read_rope(config, default_theta=family.rope_theta)
    config = {**family.defaults, **config}
    for key, value in family.required.items():
        if config.get(key, value) != value:
            raise UserError(
                f"'{hf_dir}' has {key} = {config[key]!r} in its config.json; "
                f"a {family.architecture} can only be converted with {key} = {value!r}"
            )
    return _architecture(config, family, hf_dir, rope_theta=theta, rope_scaling=scaling)


def _architecture(config: dict[str, Any], family: Family, hf_dir: str | Path, **rope: Any) -> Architecture:
    def size(key: str, default: int | None = None) -> int:
        value = config.get(key) or default
        if not isinstance(value, int) or value < 1:
            raise UserError(f"'{hf_dir}/config.json' has {key} = {value!r}: it must be a positive integer")
        return value

    heads = size("num_attention_heads")
    return Architecture(
        family=family.name,
        num_layers=size("num_hidden_layers"),
        hidden_size=size("hidden_size"),
        ffn_hidden_size=size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=size("num_key_value_heads", heads),
        head_dim=size("head_dim", config["hidden_size"] // heads),
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings"),
        rms_norm_eps=float(config["rms_norm_eps"]),
        **rope,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.has("self_attention.linear_qkv.bias"),
        qk_norm=family.has("self_attention.q_layernorm.weight"),
        sliding_window=config.get("sliding_window"),
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
    )
