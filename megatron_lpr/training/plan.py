"""What a training run is going to do, checked and printed before any process group or GPU is taken."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_lpr.config import Recipe
from megatron_lpr.conversion.families import Architecture, read_architecture
from megatron_lpr.conversion.origins import with_layers_kept_dense
from megatron_lpr.data.manifest import Manifest
from megatron_lpr.data.replay_sampler import ReplaySampler
from megatron_lpr.data.spot_check import check_at_start, unrecorded
from megatron_lpr.data.subset import unshuffled
from megatron_lpr.data.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.platform import Ranks
from megatron_lpr.recipe_io import to_tree
from megatron_lpr.training.replay_budget import ReplayBudget, replay_budget
from megatron_lpr.training.run_state import RunState, checkpoint_folder, find_checkpoint, read_run_state
from megatron_lpr.validation import check_recipe


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run."""

    recipe: Recipe
    arch: Architecture
    manifest: Manifest
    sampler: ReplaySampler
    world_size: int
    source: Path | None  # checkpoint that gives the weights of a fresh run; None: the base model
    resume: Path | None  # checkpoint of this run itself
    state: RunState | None  # of `resume`
    replay: ReplayBudget | None = None  # None: nothing of the original languages is read

    @property
    def first_step(self) -> int:
        return self.state.step if self.state else 0

    def recipe_path(self) -> Path:
        """Where the resolved recipe is written."""
        return Path(self.recipe.output) / "recipe.yaml"

    @property
    def is_original(self) -> list[bool]:
        """Per language of the manifest: whether the base model knows it."""
        return [role == "original" for role in self.manifest.language_roles.values()]


def plan_training(recipe: Recipe, world_size: int) -> Plan:
    """Check the recipe against the model, the corpora, the checkpoints and the number of ranks; nothing is written.

    Raises:
        UserError: whatever is wrong, in one sentence.
    """
    if recipe.train is None:
        raise UserError("train: missing; the recipe describes no training run")
    arch = with_layers_kept_dense(read_architecture(recipe.model.base), recipe.model.mlp_only_layers)
    check_recipe(recipe, arch, world_size)
    manifest = Manifest.load(recipe.data.manifest)
    _check_tokenizer(recipe, arch, manifest)
    sampler = ReplaySampler.of(manifest, recipe.data, recipe.train.seed)
    check_at_start(manifest, Ranks.from_environment().local_rank)
    resume = find_checkpoint(recipe.output)
    state = read_run_state(resume) if resume else None
    if state:
        _check_resume(recipe, state, sampler)
    source = checkpoint_folder(recipe.model.load) if recipe.model.load else None
    if source:
        _check_same_model(recipe, source)
    replay = replay_budget(recipe, sampler, source)
    if replay:
        replay.check()
    return Plan(
        recipe=recipe,
        arch=arch,
        manifest=manifest,
        sampler=sampler,
        world_size=world_size,
        source=source,
        resume=resume,
        state=state,
        replay=replay,
    )


def _check_tokenizer(recipe: Recipe, arch: Architecture, manifest: Manifest) -> None:
    tokenizer = manifest.tokenizer
    base = load_tokenizer(recipe.model.base)
    if tokenizer.vocab_size > arch.vocab_size or tokenizer.sha256 != base.sha256:
        raise UserError(
            f"data.manifest: {recipe.data.manifest} was made with a tokenizer of another vocabulary "
            f"({tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}) than the model's in {recipe.model.base} "
            f"({base.vocab_size} tokens, sha256 {base.sha256[:12]}); preprocess the corpora with the model's tokenizer"
        )


def _check_resume(recipe: Recipe, state: RunState, sampler: ReplaySampler) -> None:
    if state.step >= recipe.train.steps:
        raise UserError(
            f"output: {recipe.output} already holds a finished run ({state.step} of {recipe.train.steps} steps); "
            "choose another folder, or raise train.steps to extend it"
        )
    if not state.has_optimizer:
        raise UserError(
            f"output: the run in {recipe.output} ended at step {state.step} without optimizer state "
            "(checkpoint.final_optimizer: false) and cannot be extended; start a new one with model.load"
        )
    sharded = state.recipe["parallel"]["distributed_optimizer"]
    if recipe.parallel.distributed_optimizer != sharded:
        raise UserError(
            f"parallel.distributed_optimizer: {recipe.parallel.distributed_optimizer}, but the run in {recipe.output} "
            f"was saved with {sharded}, whose optimizer state has another form; every other size may change"
        )
    sampler.check_state(state.data_state)


def _check_same_model(recipe: Recipe, source: Path) -> None:
    there = read_run_state(source).recipe["model"]
    here = to_tree(recipe.model)
    for field in ("num_experts", "num_frozen_experts", "topk", "mlp_only_layers"):
        if there.get(field, here[field]) != here[field]:
            raise UserError(f"model.{field}: {here[field]}, but the checkpoint {source} has {there[field]}")


def changed_settings(recipe: Recipe, state: RunState) -> list[str]:
    """`section.key: old -> new` of what a resumed run changes; never silent."""
    old, new = _flat(state.recipe), _flat(to_tree(recipe))
    return [f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def describe(plan: Plan) -> str:
    """The resolved recipe and what it comes to."""
    recipe, train = plan.recipe, plan.recipe.train
    steps = train.steps - plan.first_step
    samples = steps * train.global_batch_size
    counts = plan.sampler.count(plan.state.consumed_samples if plan.state else 0, samples)
    shares = ", ".join(f"{language} {n:,}" for language, n in counts.tokens_per_language.items())
    start = f"checkpoint {plan.source}" if plan.source else f"base model {recipe.model.base}"
    if plan.resume:
        start = f"step {plan.first_step} of this run ({plan.resume})"
    return "\n".join(
        [
            *(f"{section}: {_one_line(value)}" for section, value in to_tree(recipe).items()),
            "",
            f"starts from  {start}",
            f"trains       {train.trainable} on {plan.world_size} rank(s)",
            f"reads        {samples:,} samples, {counts.tokens:,} tokens in {steps:,} steps: {shares}",
            *([f"replays      {plan.replay}"] if plan.replay else []),
            *(f"warning      {sentence}" for sentence in unshuffled(plan.manifest, recipe.data.replay)),
            *(f"note         {sentence}" for sentence in unrecorded(plan.manifest)),
        ]
    )


def _one_line(value: Any) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return text.split("\n")[0]
