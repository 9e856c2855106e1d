"""What the stock transformers class of an export expects to find on disk, without building the model."""

from pathlib import Path

import torch

from megatron_lpr.errors import UserError


def stock_shapes(hf_dir: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the class named in config.json loads, built on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of whatever kind the damage is
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"transformers cannot read '{hf_dir}/config.json': {reason}") from error
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    shapes = {name: tuple(tensor.shape) for name, tensor in _as_on_disk(model, tensors).items()}
    # a shared expert of width 0: nothing is missing where its tensors are, and vLLM has no place for them
    return {name: shape for name, shape in shapes.items() if 0 not in shape}


def _as_on_disk(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 fuses experts in memory and stores them one by one; 4.x never fuses them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return tensors
    return revert_weight_conversion(model, tensors)
