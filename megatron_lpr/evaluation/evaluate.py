"""Score one model on held-out text, and say where its routers send each language."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lpr.checkpoint.own_recipe import own_recipe
from megatron_lpr.checkpoint.run_state import checkpoint_folder, read_run_state
from megatron_lpr.checkpoint.verification import refuse_damaged
from megatron_lpr.data.text.special_tokens import SpecialTokens, special_tokens
from megatron_lpr.data.text.tokenize import Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError, warn
from megatron_lpr.evaluation.held_out import HeldOut, check_evaluation, read_held_out, trained_on
from megatron_lpr.evaluation.hf_model import hf_nll_fn
from megatron_lpr.evaluation.perplexity import CorpusScore, NllFn, evaluate_corpora
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.platform import device, megatron, single_process
from megatron_lpr.recipe.settings import Recipe

Report = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model, and the recipe that names the held-out text; neither has been read.

    folder: a checkpoint of ours, or with `is_hf` any Hugging Face causal model.
    """

    recipe: Recipe
    folder: Path
    is_hf: bool

    @property
    def tokenizer_dir(self) -> str:
        """A checkpoint has its base model's tokenizer."""
        return str(self.folder) if self.is_hf else self.recipe.model.base

    def check(self) -> Tokenizer:
        """Everything that can be wrong before text or a model is read; returns the model's tokenizer.

        Raises:
            UserError: as `check_evaluation`; a tokenizer that cannot do what the recipe asks for, or does other than
                in training.
        """
        check_evaluation(self.recipe.evaluation, self.tokenizer_dir)
        tokenizer = load_tokenizer(self.tokenizer_dir, special=special_tokens(self.recipe.preprocess))
        if not self.is_hf:
            _check_trained_alike(self.recipe, self.folder, tokenizer)
        return tokenizer

    def run(self, name: str | None = None, report: Report = lambda line: None) -> EvaluationResult:
        """Bits per byte on each corpus and, of a checkpoint with experts, shares of the frozen ones.

        Args:
            name: of the model in tables; without it that of its run, or of its folder.
            report: gets lines of progress.

        Raises:
            UserError: as `check`; bad held-out text; a model that cannot be read.
        """
        tokenizer = self.check()
        for sentence in trained_on(self.recipe):
            warn(sentence)
        corpora = read_held_out(self.recipe.evaluation)
        if not self.is_hf:
            refuse_damaged(self.folder, contents=self.recipe.checkpoint.verify, load=self.recipe.model.load)
        score = self._score_hf if self.is_hf else self._score_checkpoint
        scores, routing = score(tokenizer, corpora, report)
        return EvaluationResult(
            model=name or self._name(),
            window=self.recipe.evaluation.window,
            tokenizer=tokenizer.sha256,
            bos_id=tokenizer.bos_id,
            parse_special_tokens=tokenizer.parses_special_tokens,
            corpora=scores,
            routing=routing,
        )

    def _name(self) -> str:
        return self.folder.resolve().name if self.is_hf else read_run_state(self.folder).recipe["name"]

    def _score_hf(
        self, tokenizer: Tokenizer, corpora: Sequence[HeldOut], report: Report
    ) -> tuple[tuple[CorpusScore, ...], dict[str, list[float]]]:
        nll_fn = hf_nll_fn(str(self.folder), self.recipe.model.dtype, str(device()))
        return self._score(nll_fn, tokenizer, corpora, report), {}

    def _score_checkpoint(
        self, tokenizer: Tokenizer, corpora: Sequence[HeldOut], report: Report
    ) -> tuple[tuple[CorpusScore, ...], dict[str, list[float]]]:
        with megatron():
            from megatron_lpr.evaluation.megatron_model import MegatronModel

            model = MegatronModel.of_checkpoint(self.recipe, str(self.folder))
            model.collect_routing(1)

            def nll_fn(tokens_BS, labels_BS):
                return model.token_losses(tokens_BS, labels_BS, language=0)

            scores: list[CorpusScore] = []
            routing: dict[str, list[float]] = {}
            for held_out in corpora:
                scores += self._score(nll_fn, tokenizer, [held_out], report)
                if shares := model.frozen_shares():
                    routing[held_out.corpus.name] = shares[0].tolist()
        return tuple(scores), routing

    def _score(
        self, nll_fn: NllFn, tokenizer: Tokenizer, corpora: Sequence[HeldOut], report: Report
    ) -> tuple[CorpusScore, ...]:
        settings = self.recipe.evaluation
        return evaluate_corpora(
            nll_fn,
            tokenizer,
            corpora,
            window=settings.window,
            batch=settings.batch,
            max_bytes=settings.max_bytes,
            report=report,
        )


def plan_evaluation(model: str | Path, recipe: Recipe | None = None) -> Evaluation:
    """`model` is a checkpoint, the output folder of a run, or the folder of any Hugging Face causal model.

    A checkpoint is scored on the corpora of its own recipe unless `recipe` names others.

    Raises:
        UserError: it is none of these, or a Hugging Face model without a recipe.
    """
    single_process("evaluate")
    if is_hf_model(model):
        if recipe is None:
            raise UserError(f"{model} is a Hugging Face model: name the recipe of the held-out text with --recipe")
        return Evaluation(recipe=recipe, folder=Path(model), is_hf=True)
    folder = checkpoint_folder(str(model))
    return Evaluation(recipe=recipe or own_recipe(folder), folder=folder, is_hf=False)


def is_hf_model(model: str | Path) -> bool:
    """Whether a folder is a Hugging Face model's, and not a checkpoint's or a run's."""
    return (Path(model) / "config.json").is_file() and not (Path(model) / "run.json").is_file()


def print_progress(line: str) -> None:
    """On stderr, as a `report` of `Evaluation.run`."""
    print(line, file=sys.stderr, flush=True)


def _check_trained_alike(recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer) -> None:
    saved = read_run_state(checkpoint).recipe
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
