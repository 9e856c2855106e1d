"""What a Megatron parameter name says: which layer, which expert, which weight. For local and TE specs."""

import re
from dataclasses import dataclass
from typing import Literal

# Transformer Engine fuses norms into the linear that follows, and keeps a group of experts in one module.
_TE_TO_LOCAL = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r"mlp.experts.local_experts.\2.\1.weight"),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.(frozen_experts|experts\.local_experts)\.(\d+)\.(.+)")
_DENSE = re.compile(r"mlp\.(linear_fc[12]\..+)")
_ROLE = {"frozen_experts": "frozen_expert", "experts.local_experts": "new_expert"}


@dataclass(frozen=True, kw_only=True)
class ParameterName:
    """A parsed Megatron parameter name.

    weight: the name relative to the model, the layer or the FFN, as in the family tables.
    layer: the layer number in the name, None outside the decoder layers.
    expert: the expert number in the name (among the frozen, or among the new experts), None outside experts.
    """

    role: Literal["model", "layer", "router", "dense_ffn", "frozen_expert", "new_expert"]
    weight: str
    layer: int | None = None
    expert: int | None = None


def parse(name: str) -> ParameterName:
    """Parses the name of a parameter of a local-spec or TE-spec GPTModel."""
    in_layer = _LAYER.fullmatch(name)
    if in_layer is None:
        return ParameterName(role="model", weight=name)
    layer, rest = int(in_layer[1]), in_layer[2]
    for pattern, replacement in _TE_TO_LOCAL:
        rest = re.sub("^" + pattern, replacement, rest)
    if rest == "mlp.router.weight":
        return ParameterName(role="router", weight=rest, layer=layer)
    if expert := _EXPERT.fullmatch(rest):
        return ParameterName(role=_ROLE[expert[1]], weight=expert[3], layer=layer, expert=int(expert[2]))
    if dense := _DENSE.fullmatch(rest):
        return ParameterName(role="dense_ffn", weight=dense[1], layer=layer)
    return ParameterName(role="layer", weight=rest, layer=layer)
