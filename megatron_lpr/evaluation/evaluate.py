"""Score one model on the recipe's held-out corpora, and say where its routers send each language."""

import json
from pathlib import Path

from megatron_lpr.config import Recipe
from megatron_lpr.data.tokenize import load_tokenizer
from megatron_lpr.evaluation.hf_model import hf_nll_fn
from megatron_lpr.evaluation.perplexity import CorpusScore, NllFn, evaluate_corpora
from megatron_lpr.evaluation.retention import EvaluationResult


def evaluate_model(recipe: Recipe, *, name: str, out: Path, checkpoint: str | None, hf: str | None) -> None:
    """Write the scores to `out` and, for a checkpoint with experts, frozen shares to `routing_file(out)`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if hf is not None:
        from megatron_lpr.platform import device

        scores = _score(recipe, hf, hf_nll_fn(hf, recipe.model.dtype, str(device())), recipe.evaluation.corpora)
    else:
        scores = _score_checkpoint(recipe, checkpoint, out)
    EvaluationResult(model=name, window=recipe.evaluation.window, corpora=scores).save(out)
    print(f"{name}: " + ", ".join(f"{s.name} {s.bits_per_byte:.3f}" for s in scores) + f" bits per byte -> {out}")


def routing_file(out: Path) -> Path:
    """Where the routing statistics lie beside an evaluation result."""
    return out.with_suffix(".routing.json")


def read_routing(out: Path) -> dict[str, list[float]]:
    """Per held-out corpus: share of routing slots in frozen experts, layer by layer, of the result in `out`."""
    return json.loads(routing_file(out).read_text(encoding="utf-8"))


def _score_checkpoint(recipe: Recipe, checkpoint: str, out: Path) -> tuple[CorpusScore, ...]:
    from megatron_lpr.platform import megatron

    with megatron():
        from megatron_lpr.evaluation.megatron_model import MegatronModel

        model = MegatronModel(recipe, checkpoint)
        model.collect_routing(1)
        scores, routing = [], {}
        for corpus in recipe.evaluation.corpora:
            def nll_fn(tokens_BS, labels_BS):
                return model.token_losses(tokens_BS, labels_BS, language=0)

            scores += _score(recipe, recipe.model.base, nll_fn, (corpus,))
            shares = model.frozen_shares()
            if shares:
                routing[corpus.name] = shares[0].tolist()
    if routing:
        routing_file(out).write_text(json.dumps(routing), encoding="utf-8")
    return tuple(scores)


def _score(recipe: Recipe, model_dir: str, nll_fn: NllFn, corpora) -> tuple[CorpusScore, ...]:
    settings = recipe.evaluation
    return evaluate_corpora(
        nll_fn,
        load_tokenizer(model_dir),
        corpora,
        window=settings.window,
        batch=settings.batch,
        max_bytes=settings.max_bytes,
    )
