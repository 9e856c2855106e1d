"""Model families, a table each. Nothing else in the package knows a Hugging Face tensor name."""

from pathlib import Path

from megatron_lpr.families.ernie import ERNIE, HELIUM
from megatron_lpr.families.hf_config import read_model
from megatron_lpr.families.llama import LLAMA, MISTRAL
from megatron_lpr.families.olmo2 import OLMO2
from megatron_lpr.families.phi3 import PHI3
from megatron_lpr.families.qwen import QWEN2, QWEN3
from megatron_lpr.families.seed_oss import SEED_OSS
from megatron_lpr.families.table import Architecture, Family

__all__ = ["FAMILIES", "Architecture", "Family", "family_of", "read_architecture"]

# A MoE class that several families are exported to is read as the first of them.
FAMILIES = {family.name: family for family in (MISTRAL, LLAMA, QWEN2, QWEN3, PHI3, SEED_OSS, ERNIE, HELIUM, OLMO2)}


def family_of(arch: Architecture) -> Family:
    return FAMILIES[arch.family]


def read_architecture(hf_dir: str | Path) -> Architecture:
    """The architecture of a HF model folder, dense or already upcycled.

    UserError: no folder, no config.json, an architecture that is not supported (the supported ones are
    named), a field that is missing, or a feature that the family cannot carry.
    """
    return read_model(hf_dir, FAMILIES.values())
