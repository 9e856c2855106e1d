"""Is an export the model of its checkpoint? Every tensor, and the logits of both on real text.

Import it after `platform.prepare()`.
"""

from collections.abc import Iterable

import torch

from megatron_lpr.config import Recipe
from megatron_lpr.conversion.export import to_hf
from megatron_lpr.conversion.verify import Check, compare_tensors
from megatron_lpr.data.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.megatron_model import MegatronModel

LOGITS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def compare_with_checkpoint(recipe: Recipe, checkpoint: str, export_dir: str, tokens: int = 256) -> list[Check]:
    """Checks of an export against the trained Megatron model in `checkpoint`.

    tokens: of each held-out corpus, that the logits are taken of.
    UserError when the recipe names no held-out text.
    """
    rows = _token_rows(recipe, tokens)
    model = MegatronModel(recipe, checkpoint)
    trained = to_hf(
        model.module.named_parameters(), model.arch, num_frozen=model.recipe.model.num_frozen_experts
    )
    return [compare_tensors(export_dir, trained), _compare_logits(model, export_dir, rows)]


def _token_rows(recipe: Recipe, tokens: int) -> list[torch.Tensor]:
    from megatron_lpr.evaluation.held_out import read_corpus

    if not recipe.evaluation.corpora:
        raise UserError("evaluation.corpora: empty; comparing logits needs some held-out text")
    texts = ["\n".join(read_corpus(corpus)[:20]) for corpus in recipe.evaluation.corpora]
    return [torch.tensor(ids[:tokens])[None] for ids in load_tokenizer(recipe.model.base).encode_batch(texts)]


def _compare_logits(model: MegatronModel, export_dir: str, rows: Iterable[torch.Tensor]) -> Check:
    """Of the Megatron model and of the export under stock transformers.

    The difference is relative to the largest logit: fp32 noise grows with it.
    """
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(export_dir, local_files_only=True, dtype="auto").eval()
    worst, largest, agree, total, differences = 0.0, 0.0, 0, 0, 0.0
    for row in rows:
        a, b = model.logits(row).float().cpu(), _stock_logits(stock, row)
        difference = (a - b).abs()
        worst, largest = max(worst, float(difference.max())), max(largest, float(b.abs().max()))
        differences += float(difference.mean()) * row.numel()
        agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        total += row.numel()
    return Check(
        name="logits",
        ok=worst <= LOGITS_TOLERANCE[model.recipe.model.dtype] * max(1.0, largest),
        detail=f"max |difference| {worst:.1e} of logits up to {largest:.1f}, mean {differences / total:.1e}, "
        f"same top token at {agree} of {total} positions (Megatron against transformers)",
    )


@torch.no_grad()
def _stock_logits(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    return model(row).logits.float()
