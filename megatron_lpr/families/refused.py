"""Why a model is refused whose class no family reads: what it computes that no family does, as far as that is known."""

from collections.abc import Sequence
from typing import Any

from megatron_lpr.families.table import HFClass

# Reason -> names of transformers classes, without `ForCausalLM`.
_REASONS = {
    "whose norms add 1 to their weights and whose embeddings are scaled": ("Gemma", "Gemma2", "Gemma3", "VaultGemma"),
    "only some of whose layers have a sliding window": ("Cwm", "Ministral", "Olmo3"),
    "which norms each head's q and k before RoPE, and what leaves attention and FFN": ("Exaone4",),
    "whose norms have no weights": ("Olmo",),
    "whose norms subtract the mean": ("StableLm",),
    "which has layers without RoPE": ("SmolLM3", "Llama4"),
    "which multiplies embeddings, residuals and logits by constants": ("Granite", "HyperCLOVAX", "MiniCPM"),
    "whose attention and FFN run side by side": ("Cohere", "Cohere2"),
    "whose RoPE turns half of each head": ("Glm", "Glm4"),
    "whose FFN has no gate": ("Apertus", "Arcee", "Bloom", "Falcon", "GPTNeoX", "Nemotron", "OPT", "Phi", "Starcoder2"),
    "which norms q and k after RoPE, not before": ("HunYuanDenseV1",),
    "whose queries are scaled by their position": ("Ministral3",),
}


def why_not(architecture: str, config: dict[str, Any], classes: Sequence[HFClass]) -> str:
    """The end of the sentence that begins with `'FOLDER' is a {architecture}, `."""
    supported = f"supported: {', '.join(sorted({each.architecture for each in classes}))}"
    inner = config.get("text_config")
    if isinstance(inner, dict):
        kind = inner.get("model_type")
        around = f"which reads more than text, around a language model of model_type {kind!r}"
        if kind in {each.model_type for each in classes}:
            return f"{around}: save that alone, as docs/families.md shows, and give its folder"
        return f"{around}, which is not supported; {supported}"
    for reason, names in _REASONS.items():
        if architecture in (f"{name}ForCausalLM" for name in names):
            return f"{reason}, so that it cannot be converted; {supported}"
    return f"which is not supported; {supported}"
