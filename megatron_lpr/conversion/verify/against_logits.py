"""Does an export compute what the trained Megatron model computes? The logits of both on real text.

Import it after `platform.prepare()`.
"""

import math
from collections.abc import Iterable

import torch

from megatron_lpr.checkpoint.own_recipe import with_experts_of
from megatron_lpr.checkpoint.run_state import checkpoint_folder
from megatron_lpr.conversion.verify.report import Check
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.evaluation.megatron_model import MegatronModel
from megatron_lpr.files.safetensors_io import torch_dtype
from megatron_lpr.model.builder import routers
from megatron_lpr.model.lpr_router import LPRRouter
from megatron_lpr.platform import device
from megatron_lpr.recipe.settings import Recipe

_TOKENS = 256  # of each held-out corpus
EXACT, ROUNDED = 1e-4, 5e-2
"""How far logits may lie apart, relative to the largest one: in float32 from the same numbers, and in bfloat16."""
NEAR_TIES = 0.01
"""Share of the positions that may differ by more: rounding chooses between two experts that are as good as equal, and
changes those that attend to that position too. A model that computes something else differs everywhere."""
TIE = 1e-4
"""In float32 the first such position of a text shows whether it is one: the gap between the last router logit that is
chosen and the first that is not is no more, relative to the largest. What comes after it in the text says nothing."""


def compare_logits(recipe: Recipe, checkpoint: str, export_dir: str) -> Check:
    """Of the Megatron model in `checkpoint` and of the export under stock transformers.

    On a CPU both compute in float32, from weights rounded as training and export did: what is left is fp32 noise. A GPU
    computes in the dtype of the run, and Transformer Engine's products there round float32 to TF32.

    Both read some tokens of each held-out corpus. The difference is relative to the largest logit: fp32 noise grows
    with it, position by position. An export that transformers cannot load fails the check.
    """
    rows = _token_rows(recipe)
    try:
        stock = _stock_model(export_dir)
    except Exception as error:  # of whatever kind the damage is
        reason = " ".join(str(error).split())[:300]
        return Check(name="logits", ok=False, detail=f"transformers cannot load it ({type(error).__name__}: {reason})")
    trained, exported = with_experts_of(recipe, checkpoint_folder(checkpoint)).model.dtype, stock.dtype
    if device().type != "cpu":
        rounded = trained == "bfloat16" or exported != torch.float32
        return _compare(MegatronModel.of_checkpoint(recipe, checkpoint), stock, rows, ROUNDED if rounded else EXACT)
    model = MegatronModel.of_checkpoint(recipe, checkpoint, dtype="float32")
    kept = {id(router.weight) for router in routers(*model.chunks)}  # in fp32, whatever else a model is trained in
    for parameter in model.module.parameters():
        weight = parameter.data if id(parameter) in kept else parameter.data.to(torch_dtype(trained))
        parameter.data.copy_(weight.to(exported))
    return _compare(model, stock.float(), rows, EXACT)


def _token_rows(recipe: Recipe) -> list[torch.Tensor]:
    from megatron_lpr.evaluation.held_out import read_corpus

    settings = recipe.evaluation
    texts = ["\n".join(read_corpus(corpus, settings.on_bad_line)[:20]) for corpus in settings.corpora]
    return [torch.tensor(ids[:_TOKENS])[None] for ids in load_tokenizer(recipe.model.base).encode_batch(texts)]


def _stock_model(export_dir: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        export_dir, local_files_only=True, dtype="auto", trust_remote_code=False
    ).eval()


def _compare(model: MegatronModel, stock: torch.nn.Module, rows: Iterable[torch.Tensor], tolerance: float) -> Check:
    worst, largest, agree, total, beyond, behind, differences = 0.0, 0.0, 0, 0, 0, 0, 0.0
    for row in rows:
        (a, gaps_S), b = _logits_and_gaps(model, row), _stock_logits(stock, row)
        difference = (a - b).abs().nan_to_num(nan=math.inf)  # max() would pass over NaN
        scale = max(1.0, float(b.abs().max()))
        differing = (difference.amax(-1) > tolerance * scale).flatten()
        first = int(differing.int().argmax())
        if tolerance == EXACT and differing[first] and gaps_S[first] <= TIE:
            behind += len(differing) - first
        else:
            beyond += int(differing.sum())
        worst, largest = max(worst, float(difference.max())), max(largest, scale)
        differences += float(difference.mean()) * row.numel()
        agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        total += row.numel()
    ties = f"{beyond} positions beyond rounding, as near ties of two experts are, " if beyond else ""
    ties += f"{behind} at or behind a tie of two experts in their text, " if behind else ""
    return Check(
        name="logits",
        ok=math.isfinite(worst) and beyond <= (NEAR_TIES * total if model.recipe.model.num_experts else 0),
        detail=f"max |difference| {worst:.1e} of logits up to {largest:.1f}, mean {differences / total:.1e}, {ties}"
        f"same top token at {agree} of {total} positions (Megatron against transformers)",
    )


def _logits_and_gaps(model: MegatronModel, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, S, V] and, over all layers with a choice, the smallest gap [S] of each position (`TIE`)."""
    gaps = [torch.full((row.numel(),), math.inf)]

    @torch.no_grad()
    def note(router: LPRRouter, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        logits_SE = router.gating(inputs[0]).flatten(0, 1).cpu()
        if router.topk < logits_SE.shape[1]:
            best = logits_SE.topk(router.topk + 1).values
            gaps.append((best[:, -2] - best[:, -1]) / logits_SE.abs().amax(1).clamp(min=1.0))

    handles = [router.register_forward_hook(note) for router in routers(*model.chunks)]
    try:
        logits = model.logits(row).float().cpu()
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.stack(gaps).amin(0)


@torch.no_grad()
def _stock_logits(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    return model(row).logits.float()
