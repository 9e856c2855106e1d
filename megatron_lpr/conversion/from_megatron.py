"""The proof that a Megatron checkpoint and its export compute the same.

Import it after `platform.prepare()`.
"""

import torch

from megatron_lpr.config import Recipe
from megatron_lpr.conversion.verify import Check
from megatron_lpr.data.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.megatron_model import MegatronModel

LOGITS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def compare_logits(recipe: Recipe, checkpoint: str, export_dir: str, tokens: int = 256) -> Check:
    """Logits of the trained Megatron model against the export under stock transformers, on held-out text.

    The difference is relative to the largest logit: fp32 noise grows with it.
    """
    from transformers import AutoModelForCausalLM

    from megatron_lpr.evaluation.perplexity import read_corpus

    if not recipe.evaluation.corpora:
        raise UserError("evaluation.corpora: empty; comparing logits needs some held-out text")
    texts = ["\n".join(read_corpus(corpus)[:20]) for corpus in recipe.evaluation.corpora]
    rows = [torch.tensor(ids[:tokens])[None] for ids in load_tokenizer(recipe.model.base).encode_batch(texts)]
    ours = MegatronModel(recipe, checkpoint)
    stock = AutoModelForCausalLM.from_pretrained(export_dir, local_files_only=True, dtype="auto").eval()
    worst, largest, agree, total, differences = 0.0, 0.0, 0, 0, 0.0
    for row in rows:
        a, b = ours.logits(row).float().cpu(), _stock_logits(stock, row)
        difference = (a - b).abs()
        worst, largest = max(worst, float(difference.max())), max(largest, float(b.abs().max()))
        differences += float(difference.mean()) * row.numel()
        agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        total += row.numel()
    tolerance = LOGITS_TOLERANCE[recipe.model.dtype]
    return Check(
        name="logits",
        ok=worst <= tolerance * max(1.0, largest),
        detail=f"max |difference| {worst:.1e} of logits up to {largest:.1f}, mean {differences / total:.1e}, "
        f"same top token at {agree} of {total} positions (Megatron against transformers)",
    )


@torch.no_grad()
def _stock_logits(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    return model(row).logits.float()
