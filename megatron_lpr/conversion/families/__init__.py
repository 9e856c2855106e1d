"""Model families, a table each. Nothing else in the package knows a Hugging Face tensor name."""

from collections.abc import Sequence
from pathlib import Path

from megatron_lpr.conversion.families.llama import LLAMA, MISTRAL
from megatron_lpr.conversion.families.qwen import QWEN2, QWEN3
from megatron_lpr.conversion.families.reading import read_model, with_mlp_only_layers, with_shared_expert
from megatron_lpr.conversion.families.table import EMBEDDING, OUTPUT_LAYER, Architecture, Family, Shape

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "OUTPUT_LAYER",
    "Architecture",
    "Family",
    "Shape",
    "family_of",
    "read_architecture",
]

# A MoE class that several families are exported to is read as the first of them.
FAMILIES = {family.name: family for family in (MISTRAL, LLAMA, QWEN2, QWEN3)}


def family_of(arch: Architecture) -> Family:
    return FAMILIES[arch.family]


def read_architecture(
    hf_dir: str | Path, mlp_only_layers: Sequence[int] = (), shared_expert_size: int | None = None
) -> Architecture:
    """The architecture of a HF model folder, dense or already upcycled.

    mlp_only_layers: layers (from 0) that get no experts when a dense model is upcycled.
    shared_expert_size: width of the zero shared expert that a dense model gets (Qwen2-MoE); without it 128.
    UserError: no folder, no config.json, an architecture that is not supported (the supported ones are
    named), a field that is missing, or a feature that the family cannot carry.
    """
    arch = read_model(hf_dir, FAMILIES.values())
    if mlp_only_layers:
        arch = with_mlp_only_layers(arch, family_of(arch), mlp_only_layers)
    if shared_expert_size is not None:
        arch = with_shared_expert(arch, family_of(arch), shared_expert_size)
    return arch
