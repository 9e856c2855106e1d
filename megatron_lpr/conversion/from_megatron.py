"""A Megatron checkpoint to a Hugging Face folder, and the proof that both compute the same.

Import it after `platform.prepare()`.
"""

import torch

from megatron_lpr.config import Recipe
from megatron_lpr.conversion.export import export_model
from megatron_lpr.conversion.verify import Check, VerifyReport, verify_export
from megatron_lpr.data.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.megatron_model import MegatronModel
from megatron_lpr.recipe_io import from_tree
from megatron_lpr.training.run_state import checkpoint_folder, read_run_state

LOGITS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def export_checkpoint(recipe: Recipe, checkpoint: str, out: str) -> VerifyReport:
    """Write `checkpoint` as a stock HF model and check the folder against the base model.

    Raises:
        UserError: the folder exists, the size is no size, or the disk is full.
    """
    model = MegatronModel(recipe, checkpoint)
    experts, dtype = model.recipe.model, recipe.export.dtype
    export_model(
        model.module.named_parameters(),
        model.arch,
        base_dir=recipe.model.base,
        out_dir=out,
        num_experts=experts.num_experts,
        num_frozen=experts.num_frozen_experts,
        topk=experts.topk,
        dtype=experts.dtype if dtype == "auto" else dtype,
        max_shard_bytes=parse_size(recipe.export.max_shard_size),
    )
    saved = from_tree(Recipe, read_run_state(checkpoint_folder(checkpoint)).recipe, where=checkpoint)
    return verify_export(out, recipe.model.base, num_frozen=saved.untouched_experts)


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


def parse_size(text: str) -> int:
    """Bytes of '500MB' or '4GB' (decimal units, as Hugging Face counts).

    Raises:
        UserError: neither a number nor a number with a unit.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size <= 0:
        raise UserError(f"export.max_shard_size: '{text}' is no size; write it as 500MB or 4GB")
    return size
