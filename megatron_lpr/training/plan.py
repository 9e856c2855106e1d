"""What a training run is going to do, checked and printed before any process group or GPU is taken."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lpr.checkpoint import same_run
from megatron_lpr.checkpoint.base_files import check_base_sizes
from megatron_lpr.checkpoint.common_state import refuse_newer
from megatron_lpr.checkpoint.holding import Content, content_of, frozen_is_base
from megatron_lpr.checkpoint.own_recipe import with_dtype_of_run
from megatron_lpr.checkpoint.run_state import (
    NONE_DAMAGED,
    RunState,
    find_checkpoint,
    locate,
    read_run_state,
    what_is_missing,
)
from megatron_lpr.checkpoint.source import chain, find_source, source_identity
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.corpus.spot_check import check_at_start
from megatron_lpr.data.corpus.tokenizer_record import read_otherwise
from megatron_lpr.data.sampler.inspect_data import repeated, short_windows, unshuffled, without_effect
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.data.text.tokenize import Tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.held_out import check_evaluation, doubts, read_held_out
from megatron_lpr.evaluation.windows import Text
from megatron_lpr.families import Architecture
from megatron_lpr.families.weights import open_weights
from megatron_lpr.files.output_place import check_place
from megatron_lpr.model.load.upcycle import check_checkpoint
from megatron_lpr.model.rank.frozen import shards_frozen
from megatron_lpr.platform import Ranks
from megatron_lpr.recipe.checks import architecture_of, check_machine, check_recipe, losses_left_out
from megatron_lpr.recipe.fp8 import lacking_to_shard
from megatron_lpr.recipe.settings import DataConfig, Recipe, TrainConfig
from megatron_lpr.training.cost import ModelSize, model_size
from megatron_lpr.training.own_tokenizer import checked_tokenizer
from megatron_lpr.training.plan_lines import decimal_size, differing, frozen_lines, long_log, one_line
from megatron_lpr.training.replay_budget import ReplayBudget, replay_budget

_HOLDS: dict[Content, str] = {
    "whole": "every weight",
    "over base": "what the base model does not hold",
    "over checkpoint": "what the checkpoint in model.load does not hold",
}
_NOT_READ = ("evaluation", "export", "preprocess")  # sections that say nothing of a training run


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run: what a `Trainer` is built from."""

    recipe: Recipe
    arch: Architecture
    manifest: Manifest
    sampler: ReplaySampler
    world_size: int
    source: Path | None  # checkpoint of model.load; None: the run started from the base model, or it is gone
    resume: Path | None  # checkpoint of this run itself
    state: RunState | None  # of `resume`
    held_out: tuple[Text, ...] = dataclasses.field(default=(), repr=False, compare=False)  # of rank 0, to validate on
    replay: ReplayBudget | None = None  # None: nothing of the original languages is read
    base: dict[str, Any]  # what the run remembers of the base model,
    origin: dict[str, Any] | None = None  # and of the checkpoint in model.load (same_run.py)
    notes: tuple[str, ...] = ()  # about checkpoints, to be printed
    dtype: str | None = None  # which was chosen, and why; None: the recipe said it
    damaged: Mapping[str, str] = dataclasses.field(default_factory=dict)  # checkpoints that were passed over, by name

    def __str__(self) -> str:
        return describe(self)

    @property
    def train(self) -> TrainConfig:
        assert self.recipe.train is not None  # plan_training has seen to it
        return self.recipe.train

    @property
    def data(self) -> DataConfig:
        assert self.recipe.data is not None
        return self.recipe.data

    @property
    def first_step(self) -> int:
        return self.state.step if self.state else 0

    @property
    def finished(self) -> bool:
        """Whether an earlier start of the run has made its last step."""
        return self.first_step >= self.train.steps

    @functools.cached_property
    def below(self) -> RunState | None:
        """Of the checkpoint that the weights come from, the run's own or another; None: they are the base model's."""
        return self.state or (read_run_state(self.source) if self.source else None)

    @property
    def frozen_is_base(self) -> bool:
        """Whether every weight but routers and new experts is the base's, bit for bit, as cast to the run's dtype."""
        below = self.below
        return frozen_is_base(
            self.recipe, below.recipe if below else None, below.base if below else None, self.arch.dtype
        )

    def content(self, *, finished: bool) -> Content:
        """What a checkpoint of the run holds, the one of its last step or one before, as things are now."""
        there = self.source is not None and self.origin is not None and what_is_missing(self.source) is None
        return content_of(self.recipe, frozen_is_base=self.frozen_is_base, on_checkpoint=there, finished=finished)

    def recipe_path(self) -> Path:
        """Where the resolved recipe is written."""
        return Path(self.recipe.output) / "recipe.yaml"

    @property
    def is_original(self) -> list[bool]:
        """Per language of the manifest: whether the base model knows it."""
        return [role == "original" for role in self.manifest.language_roles.values()]


def plan_training(recipe: Recipe, world_size: int | None = None, damaged: Mapping[str, str] = NONE_DAMAGED) -> Plan:
    """Check the recipe against the model, the corpora, the checkpoints and the number of ranks; nothing is written.

    Args:
        world_size: ranks of the run; without it those that this process was started with.
        damaged: checkpoints of the run that are passed over, by name, and what is wrong with them.

    Raises:
        UserError: whatever is wrong, in one sentence.
    """
    if recipe.train is None:
        raise UserError("train: missing; the recipe describes no training run")
    ranks = Ranks.from_environment()
    world_size = ranks.world_size if world_size is None else world_size
    recipe, arch, dtype = _checked(recipe, world_size, elsewhere=world_size != ranks.world_size, damaged=damaged)
    train, data = recipe.train, recipe.data
    assert train is not None and data is not None
    manifest = Manifest.load(data.manifest, check_files=ranks.local_rank == 0)
    tokenizer = checked_tokenizer(recipe, arch, manifest)
    sampler = ReplaySampler.of(manifest, data, train.seed)
    check_at_start(manifest, ranks.local_rank)
    base = same_run.base_identity(recipe.model.base, arch, tokenizer.sha256)
    resume = find_checkpoint(recipe.output, damaged)
    start = resume or (locate(recipe.model.load) if recipe.model.load else None)
    source = state = origin = None
    held_out: tuple[Text, ...] = ()
    if resume:
        state = same_run.resumed_state(resume.folder)
        same_run.check_resumed(recipe, state, base)
        if state.step < train.steps:  # nothing is read by a run that is finished
            sampler.check_state(state.data_state or {})
            _check_under(recipe, resume.folder)
        source, origin = find_source(state, recipe.model.load), state.source
    elif start:
        source = start.folder
        same_run.check_source(recipe, source, base)
        _check_under(recipe, source)
        origin = source_identity(source)
    else:
        check_checkpoint(open_weights(recipe.model.base, arch), arch, (ranks.rank, ranks.world_size))
    if state is None or state.step < train.steps:
        check_place(recipe.output, recipe.model.base)
        held_out = _held_out(recipe, tokenizer, ranks.rank)
    replay = replay_budget(train, data, sampler, origin["tokens"] if origin else None)
    if replay:
        replay.check()
    notes = [start.note] if start else []
    notes += [same_run.rounded(recipe, source)] if source and not resume else []
    plan = Plan(
        recipe=recipe,
        arch=arch,
        manifest=manifest,
        sampler=sampler,
        world_size=world_size,
        source=source,
        resume=resume.folder if resume else None,
        state=state,
        held_out=held_out,
        replay=replay,
        base=base,
        origin=origin,
        notes=tuple(note for note in notes if note),
        damaged=damaged,
        dtype=dtype,
    )
    _check_frozen_fp8(plan)
    return plan


def _checked(
    recipe: Recipe, world_size: int, *, elsewhere: bool, damaged: Mapping[str, str]
) -> tuple[Recipe, Architecture, str | None]:
    """A recipe with its dtype and what that is told with; `elsewhere`: for other machines (--dry-run --ranks)."""
    recipe, dtype = with_dtype_of_run(recipe, damaged, elsewhere=elsewhere)
    arch = architecture_of(recipe.model)
    check_recipe(recipe, arch, world_size)
    if not elsewhere:
        check_machine(recipe)
    return recipe, arch, dtype


def _check_frozen_fp8(plan: Plan) -> None:
    """UserError where weights could not be held in FP8, or would have to be saved."""
    if plan.recipe.fp8.frozen_weights != "fp8":
        return
    lacking = lacking_to_shard(plan.recipe.fp8)
    if lacking and shards_frozen(plan.recipe, plan.arch, plan.world_size):
        raise UserError(
            f"fp8.frozen_weights: fp8 does not go with sharded frozen weights (parallel.frozen) here: {lacking}; set "
            "parallel.frozen: replicated, or bf16"
        )
    if plan.content(finished=True) == "whole":
        raise UserError(
            "fp8.frozen_weights: fp8 keeps rounded values only, and each checkpoint has to hold the frozen weights of "
            f"{plan.source or plan.resume}, which are not the base's; set bf16"
        )


def _held_out(recipe: Recipe, tokenizer: Tokenizer, rank: int) -> tuple[Text, ...]:
    """What the run validates on; every rank looks at the settings, rank 0 at the text."""
    if not recipe.evaluation.every:
        return ()
    check_evaluation(recipe.evaluation, recipe.model.base)
    return tuple(read_held_out(recipe.evaluation, tokenizer)) if rank == 0 else ()


def _check_under(recipe: Recipe, checkpoint: Path) -> None:
    """Raises UserError unless what the checkpoint does not hold is there: other checkpoints, the files of the base.

    And where Megatron-Core would not load one of them.
    """
    folders = chain(checkpoint, recipe.model.load)
    for folder in folders:
        refuse_newer(folder)
    lowest = folders[-1]
    state = read_run_state(lowest)
    if state.content == "over base":
        check_base_sizes(recipe.model.base, state.base, lowest)


def _warnings(plan: Plan) -> Iterator[str]:
    yield from plan.notes
    yield from losses_left_out(plan.recipe)
    yield from unshuffled(plan.manifest, plan.data.replay)
    yield from short_windows(plan.manifest, plan.sampler)
    yield from repeated(plan.train, plan.sampler)
    yield from without_effect(plan.train, plan.data, plan.sampler)
    yield from long_log(plan.recipe, plan.arch, len(plan.manifest.languages))
    yield from read_otherwise(plan.manifest.tokenizer, plan.recipe.preprocess)
    if plan.held_out:
        yield from doubts(plan.recipe)


def describe(plan: Plan) -> str:
    """What differs from the default settings, and what the run comes to."""
    recipe, train = plan.recipe, plan.train
    if plan.finished:
        done = (
            f"nothing to do: the run in {recipe.output} has made all its {train.steps:,} steps ({plan.resume}); raise "
            "train.steps to train on"
        )
        return "\n".join([done, *(f"warning      {sentence}" for sentence in plan.notes)])
    steps, size = train.steps - plan.first_step, model_size(recipe, plan.arch)
    samples = steps * train.global_batch_size
    counts = plan.sampler.count(plan.state.consumed_samples if plan.state else 0, samples)
    shares = ", ".join(f"{language} {n:,}" for language, n in counts.tokens_per_language.items())
    start = f"checkpoint {plan.source}" if plan.source else f"base model {recipe.model.base}"
    if plan.resume:
        start = f"step {plan.first_step} of this run ({plan.resume})"
    settings = {section: value for section, value in differing(recipe).items() if section not in _NOT_READ}
    return "\n".join(
        [
            f"# what differs from the defaults; every setting goes to {plan.recipe_path()}",
            *(f"{section}: {one_line(value)}" for section, value in settings.items()),
            "",
            f"starts from  {start}",
            f"trains       {train.trainable} on {plan.world_size} rank(s)",
            f"parameters   {size.frozen + size.trainable:,}: {size.trainable:,} trainable, {size.frozen:,} frozen",
            *([f"dtype        {plan.dtype}"] if plan.dtype else []),
            *frozen_lines(recipe, plan.arch, plan.world_size),
            *_checkpoints(plan, size),
            f"reads        {samples:,} samples, {counts.tokens:,} tokens in {steps:,} steps: {shares}",
            *([f"replays      {plan.replay}"] if plan.replay else []),
            *(f"warning      {sentence}" for sentence in _warnings(plan)),
        ]
    )


def _checkpoints(plan: Plan, size: ModelSize) -> Iterator[str]:
    """How large checkpoints are, and what they hold: those on the way and, where it differs, the last."""
    on_the_way, last = plan.content(finished=False), plan.content(finished=True)
    for label, content in (("checkpoint  ", on_the_way), ("the last one", last)):
        weights, all_of_it = size.weight_bytes[content], size.checkpoint_bytes(content)
        if label == "checkpoint  " or content != on_the_way:
            sizes = f"{decimal_size(weights)}, {decimal_size(all_of_it)} with the optimizer's state"
            yield f"{label} {sizes}: {_HOLDS[content]}"
