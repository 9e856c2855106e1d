"""Any Hugging Face causal language model as the `nll_fn` of `perplexity`: base models, exports, others."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.perplexity import NllFn
from megatron_lpr.files.safetensors_io import read_header


def hf_nll_fn(path: str, dtype: str = "float32", device: str = "cpu") -> NllFn:
    """Load the model folder `path`, from local files alone, and return its token losses.

    Args:
        path: a folder with config.json and weights that `AutoModelForCausalLM` knows.
        dtype: `float32` or `bfloat16`, of parameters and activations; the loss is always taken in fp32.
        device: torch device of the model.

    Raises:
        UserError: no such folder, a model that transformers cannot load, weights that lack a tensor
            (transformers would initialise it at random); from the function, a token that the model does not have.
    """
    model = _load(path, dtype).to(device).eval()
    vocab_size = model.get_input_embeddings().num_embeddings

    @torch.inference_mode()
    def nll_fn(tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        largest = int(max(tokens_BS.max(), labels_BS.max()))
        if largest >= vocab_size:
            raise UserError(f"model {path}: its tokenizer makes token {largest}, but it has embeddings of {vocab_size}")
        logits_BSV = model(input_ids=tokens_BS.to(device), use_cache=False).logits
        labels_BS = labels_BS.to(device)
        # Row by row: an fp32 copy of all logits would be the largest tensor of the evaluation.
        return torch.stack(
            [
                functional.cross_entropy(logits_SV.float(), labels_S, reduction="none")
                for logits_SV, labels_S in zip(logits_BSV, labels_BS, strict=True)
            ]
        )

    return nll_fn


def _load(path: str, dtype: str) -> Any:  # a PreTrainedModel, which ships no types
    # Seconds to import: not paid by those who score other models.
    from transformers import AutoModelForCausalLM

    if not (Path(path) / "config.json").is_file():
        raise UserError(f"model {path}: no folder with a config.json")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,  # or transformers asks at the terminal whether to run the folder's code
            ignore_mismatched_sizes=True,  # reported below, in one sentence
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        for file in sorted(Path(path).glob("*.safetensors")):
            read_header(file)  # tells one that is damaged by its name; to transformers one without the right is missing
        reason = " ".join(str(error).split())
        raise UserError(f"model {path}: transformers cannot load it: {reason}") from None
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise UserError(f"model {path}: {len(absent)} tensors are missing or misshapen, first {absent[0]}")
    return model
