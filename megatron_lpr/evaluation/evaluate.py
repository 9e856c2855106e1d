"""Score one model on the recipe's held-out corpora, and say where its routers send each language."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.data.text.special_tokens import SpecialTokens, special_tokens
from megatron_lpr.data.text.tokenize import Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.held_out import HeldOut, check_evaluation, read_held_out
from megatron_lpr.evaluation.hf_model import hf_nll_fn
from megatron_lpr.evaluation.perplexity import CorpusScore, NllFn, evaluate_corpora
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.recipe.settings import Recipe


def check(recipe: Recipe, *, out: Path, checkpoint: str | None, hf: str | None) -> Tokenizer:
    """Everything that can be wrong before text or a model is read; returns the model's tokenizer.

    Raises:
        UserError: as `check_evaluation`; a tokenizer that cannot do what the recipe asks for, or does other than in
            training; a file `out` that cannot be written.
    """
    model_dir = hf or recipe.model.base
    check_evaluation(recipe.evaluation, model_dir)
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, as {out / 'result.json'}")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: cannot be written in {there}")
    tokenizer = load_tokenizer(model_dir, special=special_tokens(recipe.preprocess))
    if checkpoint is not None and hf is None:
        _check_trained_alike(recipe, checkpoint, tokenizer)
    return tokenizer


def _check_trained_alike(recipe: Recipe, checkpoint: str, tokenizer: Tokenizer) -> None:
    saved = read_run_state(Path(checkpoint)).recipe
    if not saved.get("train"):
        return
    bos = saved.get("preprocess", {}).get("bos", "false")  # runs from before the setting had no BOS token
    trained = load_tokenizer(recipe.model.base, special=SpecialTokens(bos=bos)).bos_id
    if trained != tokenizer.bos_id:
        raise UserError(
            f"preprocess.bos: {recipe.preprocess.bos} opens documents with token {tokenizer.bos_id}, but the run in "
            f"{checkpoint} learned from documents that open with {trained}; evaluate it, and the base model, with "
            f"preprocess.bos: {bos}"
        )


def evaluate_model(recipe: Recipe, *, name: str, out: Path, checkpoint: str | None, hf: str | None) -> None:
    """Write the scores to `out` and, for a checkpoint with experts, frozen shares to `routing_file(out)`.

    Raises:
        UserError: as `check`; bad held-out text; a model that cannot be read.
    """
    tokenizer = check(recipe, out=out, checkpoint=checkpoint, hf=hf)
    corpora = read_held_out(recipe.evaluation)
    out.parent.mkdir(parents=True, exist_ok=True)
    if hf is not None:
        from megatron_lpr.platform import device

        nll_fn = hf_nll_fn(hf, recipe.model.dtype, str(device()))
        scores = _score(recipe, tokenizer, nll_fn, corpora)
    else:
        scores = _score_checkpoint(recipe, tokenizer, checkpoint, corpora, out)
    EvaluationResult(
        model=name,
        window=recipe.evaluation.window,
        tokenizer=tokenizer.sha256,
        bos_id=tokenizer.bos_id,
        corpora=scores,
    ).save(out)
    print(f"{name}: " + ", ".join(f"{s.name} {s.bits_per_byte:.3f}" for s in scores) + f" bits per byte -> {out}")


def routing_file(out: Path) -> Path:
    """Where the routing statistics lie beside an evaluation result."""
    return out.with_suffix(".routing.json")


def read_routing(out: Path) -> dict[str, list[float]]:
    """Per held-out corpus: share of routing slots in frozen experts, layer by layer, of the result in `out`."""
    return json.loads(routing_file(out).read_text(encoding="utf-8"))


def _score_checkpoint(
    recipe: Recipe, tokenizer: Tokenizer, checkpoint: str, corpora: Sequence[HeldOut], out: Path
) -> tuple[CorpusScore, ...]:
    from megatron_lpr.platform import megatron

    with megatron():
        from megatron_lpr.evaluation.megatron_model import MegatronModel

        model = MegatronModel.of_checkpoint(recipe, checkpoint)
        model.collect_routing(1)

        def nll_fn(tokens_BS, labels_BS):
            return model.token_losses(tokens_BS, labels_BS, language=0)

        scores, routing = [], {}
        for held_out in corpora:
            scores += _score(recipe, tokenizer, nll_fn, [held_out])
            shares = model.frozen_shares()
            if shares:
                routing[held_out.corpus.name] = shares[0].tolist()
    if routing:
        routing_file(out).write_text(json.dumps(routing), encoding="utf-8")
    return tuple(scores)


def _score(recipe: Recipe, tokenizer: Tokenizer, nll_fn: NllFn, corpora: Sequence[HeldOut]) -> tuple[CorpusScore, ...]:
    settings = recipe.evaluation
    return evaluate_corpora(
        nll_fn,
        tokenizer,
        corpora,
        window=settings.window,
        batch=settings.batch,
        max_bytes=settings.max_bytes,
    )
