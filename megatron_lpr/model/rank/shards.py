"""Which frozen weights are spread over ranks, and what a rank holds of them.

Each matrix is cut along its rows into as many equal parts as the group has ranks, the last ones shorter, as PyTorch's
FSDP2 does (the idea is ZeRO's third stage, Rajbhandari et al., arXiv 1910.02054; here without gradients).
"""

from megatron_lpr.model.rank.parameters import Parameter
from megatron_lpr.model.rank.place import Place

# Small, and no part of a module that is gathered.
_NEVER = ("input_layernorm", "pre_mlp", "_bda.", "final_layernorm", ".router.")


def is_spread(parameter: Parameter, place: Place) -> bool:
    if not place.spread or parameter.learns or place.size(parameter.copies) == 1:
        return False
    return not any(part in parameter.name for part in _NEVER)


def held_elements(parameter: Parameter, place: Place) -> int:
    """Of a parameter that does not learn, on this rank; equal on all ranks, for the last ones are padded."""
    if not is_spread(parameter, place):
        return parameter.elements
    return -(-parameter.rows // place.size(parameter.copies)) * parameter.columns


def unit_name(parameter: Parameter) -> str:
    """What is gathered at once: a layer's attention, its FFN, all its frozen experts, all its new ones."""
    if not parameter.name.startswith("decoder.layers."):
        return parameter.name
    *layer, module, part = parameter.name.split(".")[:5]
    return ".".join([*layer, module, part] if part in ("experts", "frozen_experts") else [*layer, module])
