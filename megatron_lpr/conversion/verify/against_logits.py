"""Does an export compute what the trained Megatron model computes? The logits of both on real text.

Import it after `platform.prepare()`.
"""

import math
from collections.abc import Iterable

import torch

from megatron_lpr.conversion.verify.report import Check
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.evaluation.megatron_model import MegatronModel
from megatron_lpr.recipe.settings import Recipe

LOGITS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def compare_logits(recipe: Recipe, checkpoint: str, export_dir: str, tokens: int = 256) -> Check:
    """Of the Megatron model in `checkpoint` and of the export under stock transformers.

    tokens: of each held-out corpus of the recipe. The difference is relative to the largest logit: fp32 noise grows
    with it. An export that transformers cannot load fails the check.
    """
    rows = _token_rows(recipe, tokens)
    try:
        stock = _stock_model(export_dir)
    except Exception as error:  # of whatever kind the damage is
        reason = " ".join(str(error).split())[:300]
        return Check(name="logits", ok=False, detail=f"transformers cannot load it ({type(error).__name__}: {reason})")
    return _compare(MegatronModel.of_checkpoint(recipe, checkpoint), stock, rows)


def _token_rows(recipe: Recipe, tokens: int) -> list[torch.Tensor]:
    from megatron_lpr.evaluation.held_out import read_corpus

    settings = recipe.evaluation
    texts = ["\n".join(read_corpus(corpus, settings.on_bad_line)[:20]) for corpus in settings.corpora]
    return [torch.tensor(ids[:tokens])[None] for ids in load_tokenizer(recipe.model.base).encode_batch(texts)]


def _stock_model(export_dir: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        export_dir, local_files_only=True, dtype="auto", trust_remote_code=False
    ).eval()


def _compare(model: MegatronModel, stock: torch.nn.Module, rows: Iterable[torch.Tensor]) -> Check:
    worst, largest, agree, total, differences = 0.0, 0.0, 0, 0, 0.0
    for row in rows:
        a, b = model.logits(row).float().cpu(), _stock_logits(stock, row)
        difference = (a - b).abs().nan_to_num(nan=math.inf)  # max() would pass over NaN
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
