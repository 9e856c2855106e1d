"""Score one model on held-out text, and say where its routers send each language."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lpr.checkpoint.own_recipe import own_recipe, with_experts_of
from megatron_lpr.checkpoint.run_state import checkpoint_folder, read_run_state
from megatron_lpr.checkpoint.same_run import check_config_and_tokenizer
from megatron_lpr.checkpoint.verification import refuse_damaged
from megatron_lpr.data.text.special_tokens import SpecialTokens, special_tokens
from megatron_lpr.data.text.tokenize import Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError, warn
from megatron_lpr.evaluation.held_out import check_evaluation, doubts, read_held_out
from megatron_lpr.evaluation.hf_model import hf_nll_fn
from megatron_lpr.evaluation.perplexity import CorpusScore, score, scored_by
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.evaluation.windows import Text
from megatron_lpr.platform import Ranks, device, from_first_rank, megatron, together
from megatron_lpr.platform.distributed import group_store
from megatron_lpr.platform.lifeline import connected
from megatron_lpr.recipe.checks import architecture_of
from megatron_lpr.recipe.dtype import with_dtype
from megatron_lpr.recipe.layout import check_layout, check_layout_here
from megatron_lpr.recipe.settings import ParallelConfig, Recipe

Report = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model, and the recipe that names the held-out text and the layout; nothing has been read.

    folder: a checkpoint of ours, or with `is_hf` any Hugging Face causal model.
    dtype: of the latter: which was chosen, and why; None: the recipe said it.
    """

    recipe: Recipe
    folder: Path
    is_hf: bool
    dtype: str | None = None

    @property
    def tokenizer_dir(self) -> str:
        """A checkpoint has its base model's tokenizer."""
        return str(self.folder) if self.is_hf else self.recipe.model.base

    def check(self) -> Tokenizer:
        """Everything that can be wrong before text or a model is read; returns the model's tokenizer.

        Raises:
            UserError: as `check_evaluation`; a tokenizer that cannot do what the recipe asks for, or does other than
                in training; parallel sizes that do not divide the model and the ranks.
        """
        check_evaluation(self.recipe.evaluation, self.tokenizer_dir)
        tokenizer = load_tokenizer(self.tokenizer_dir, special=special_tokens(self.recipe.preprocess))
        if not self.is_hf:
            check_trained_alike(self.recipe, self.folder, tokenizer)
            recipe = dataclasses.replace(with_experts_of(self.recipe, self.folder), train=None)
            check_layout(recipe, architecture_of(recipe.model), Ranks.from_environment().world_size)
            check_layout_here(recipe)
        return tokenizer

    def run(self, name: str | None = None, report: Report = lambda line: None) -> EvaluationResult:
        """Bits per byte on each corpus and, of a checkpoint with experts, shares of the frozen ones.

        On several ranks all of them call it, and get the same; rank 0 reads the text, warns and reports.

        Args:
            name: of the model in tables; without it that of its run, or of its folder.
            report: gets lines of progress.

        Raises:
            UserError: as `check`; bad held-out text; a model that cannot be read.
        """
        is_first = Ranks.from_environment().rank == 0
        tokenizer = together(self.check)
        texts = together(lambda: self._read(tokenizer) if is_first else [])
        if not self.is_hf:
            refuse_damaged(self.folder, contents=self.recipe.checkpoint.verify, load=self.recipe.model.load)
        if self.dtype:
            report(f"dtype {self.dtype}")
        score_texts = self._score_hf if self.is_hf else self._score_checkpoint
        scores, routing = score_texts(texts, report if is_first else lambda line: None)
        return EvaluationResult(
            model=name or self._name(),
            window=self.recipe.evaluation.window,
            tokenizer=tokenizer.sha256,
            bos_id=tokenizer.bos_id,
            parse_special_tokens=tokenizer.parses_special_tokens,
            corpora=scores,
            routing=routing,
        )

    def _read(self, tokenizer: Tokenizer) -> list[Text]:
        for sentence in doubts(self.recipe):
            warn(sentence)
        return read_held_out(self.recipe.evaluation, tokenizer)

    def _name(self) -> str:
        return self.folder.resolve().name if self.is_hf else read_run_state(self.folder).recipe["name"]

    def _score_hf(
        self, texts: Sequence[Text], report: Report
    ) -> tuple[tuple[CorpusScore, ...], dict[str, list[float]]]:
        settings = self.recipe.evaluation
        nll_fn = hf_nll_fn(str(self.folder), self.recipe.model.dtype, str(device()))
        return score(scored_by(nll_fn, window=settings.window, batch=settings.batch), texts, report), {}

    def _score_checkpoint(
        self, texts: Sequence[Text], report: Report
    ) -> tuple[tuple[CorpusScore, ...], dict[str, list[float]]]:
        with megatron() as ranks, connected(ranks, group_store):
            from megatron_lpr.evaluation.megatron_model import MegatronModel

            texts = from_first_rank(texts)
            model = MegatronModel.of_checkpoint(self.recipe, str(self.folder), self.recipe.parallel)
            model.collect_routing(len(texts))
            scores = score(model.nats, texts, report)
            shares = model.frozen_shares()  # none of a dense model
        return scores, {text.corpus.name: of_text.tolist() for text, of_text in zip(texts, shares, strict=False)}


def plan_evaluation(model: str | Path, recipe: Recipe | None = None) -> Evaluation:
    """`model` is a checkpoint, the output folder of a run, or the folder of any Hugging Face causal model.

    A checkpoint is scored on the corpora of its own recipe unless `recipe` names others. Several ranks share it by the
    parallel sizes of that recipe; one process has it whole, whatever the layout of training was.

    Raises:
        UserError: it is none of these, or a Hugging Face model without a recipe, or on several ranks.
    """
    world_size = Ranks.from_environment().world_size
    if is_hf_model(model):
        if world_size > 1:
            raise UserError(
                f"{model} is a Hugging Face model, which is evaluated in one process, not in {world_size}; start the "
                "command without torchrun or srun, or evaluate the checkpoint that it was exported from"
            )
        if recipe is None:
            raise UserError(f"{model} is a Hugging Face model: name the recipe of the held-out text with --recipe")
        recipe, dtype = with_dtype(recipe)
        return Evaluation(recipe=recipe, folder=Path(model), is_hf=True, dtype=dtype)
    folder = checkpoint_folder(str(model))
    recipe = recipe or own_recipe(folder)
    if world_size == 1:
        recipe = dataclasses.replace(recipe, parallel=ParallelConfig())
    return Evaluation(recipe=recipe, folder=folder, is_hf=False)


def is_hf_model(model: str | Path) -> bool:
    """Whether a folder is a Hugging Face model's, and not a checkpoint's or a run's."""
    return (Path(model) / "config.json").is_file() and not (Path(model) / "run.json").is_file()


def print_progress(line: str) -> None:
    """On stderr, as a `report` of `Evaluation.run`."""
    print(line, file=sys.stderr, flush=True)


def check_trained_alike(recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError where the base has another config or tokenizer than in the run that wrote the checkpoint, or
    documents are opened otherwise."""
    model = with_experts_of(recipe, checkpoint).model
    check_config_and_tokenizer(model.base, architecture_of(model), checkpoint)
    saved = read_run_state(checkpoint).recipe
    if not saved["train"]:
        return
    bos = saved["preprocess"]["bos"]
    trained = load_tokenizer(recipe.model.base, special=SpecialTokens(bos=bos)).bos_id
    if trained != tokenizer.bos_id:
        raise UserError(
            f"preprocess.bos: {recipe.preprocess.bos} opens documents with token {tokenizer.bos_id}, but the run in "
            f"{checkpoint} learned from documents that open with {trained}; evaluate it, and the base model, with "
            f"preprocess.bos: {bos}"
        )
