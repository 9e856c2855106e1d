"""The package from Python: what the commands do, in scripts and notebooks.

`megatron_lpr` itself has these names, and those of the classes (docs/python-api.md). What a user can put right is a
`UserError`. Nothing is printed but warnings, and by training.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_lpr.checkpoint.own_recipe import own_recipe
from megatron_lpr.checkpoint.run_folder import run_folder
from megatron_lpr.checkpoint.run_state import checkpoint_folder
from megatron_lpr.conversion.export.export import export_checkpoint, upcycle_hf
from megatron_lpr.conversion.import_hf import import_hf
from megatron_lpr.conversion.verify.report import VerifyReport
from megatron_lpr.conversion.verify.verification import plan_verification
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.evaluate import plan_evaluation, print_progress
from megatron_lpr.evaluation.retention import EvaluationResult, retention_table
from megatron_lpr.platform import Ranks, megatron, single_process, together
from megatron_lpr.platform.callers_torch import callers_torch_set_aside
from megatron_lpr.platform.distributed import group_store, no_rank_yet
from megatron_lpr.platform.lifeline import connected
from megatron_lpr.platform.watchdog import watched
from megatron_lpr.recipe.checks import expansion_of
from megatron_lpr.recipe.dtype import with_dtype
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.signals import stoppable
from megatron_lpr.training.good_checkpoint import plan_on_good_checkpoint
from megatron_lpr.training.hooks.hook import Hook
from megatron_lpr.training.plan import Plan


@callers_torch_set_aside()
def plan(recipe: Recipe, *, world_size: int | None = None) -> Plan:
    """Check a training recipe against the model, the corpora and the checkpoints, byte by byte; nothing is written.

    `print(plan(recipe))` shows what the run reads, where it starts and what to be warned of. `.sampler` gives the
    batches that it will read.

    Args:
        world_size: ranks of the run; without it those that this process is one of.
    """
    ranks = Ranks.from_environment().world_size if world_size is None else world_size
    return plan_on_good_checkpoint(recipe, ranks)


@contextlib.contextmanager
def session(run: Plan) -> Iterator[None]:
    """Inside it this process is a rank of the run, whose output folder is its own: the place for a `Trainer`.

    In the main thread signals ask the run to stop, and mean what they meant before when it has ended.

    Raises:
        UserError: the plan is of other ranks than these, or older than what is in the output folder; another run holds
            the folder; this process is a rank of a run already.
    """
    recipe, limits, there = run.recipe, run.recipe.cluster, Ranks.from_environment().world_size
    if run.world_size != there:
        raise UserError(
            f"the plan is of a run on {run.world_size} ranks, and {there} are here: plan without world_size="
        )
    no_rank_yet()  # first: the watchdog of a session around this one would end with it
    with contextlib.ExitStack() as inside:
        inside.enter_context(stoppable("training"))
        inside.enter_context(run_folder(recipe.output, run.resume, run.damaged))
        inside.enter_context(watched(recipe.output, Ranks.from_environment().rank, 60 * limits.startup_minutes))
        ranks = inside.enter_context(megatron(limits.collective_timeout_minutes))
        inside.enter_context(connected(ranks, group_store))
        yield


def train(run: Plan, hooks: Iterable[Hook] = ()) -> None:
    """Train to the last step; a finished run has nothing to do.

    Args:
        hooks: what is called around the loop, after what every run does.

    Raises:
        Stopped: a signal or the end of its time has stopped the run, which has saved. Uncaught, it is exit status 75.
    """
    if run.finished:
        return
    with session(run):
        from megatron_lpr.training.train import Trainer

        Trainer(run, hooks).run()


@callers_torch_set_aside()
def upcycle(
    recipe: Recipe,
    *,
    hf: str | Path | None = None,
    progress: bool = False,
    command: str | None = None,
    dry_run: bool = False,
    on_verified: Callable[[VerifyReport], object] = lambda report: None,
) -> Path:
    """Write the base model with experts, as a checkpoint in the recipe's output; returns its folder.

    Args:
        hf: a new folder for a stock Hugging Face model instead, the same that an export of the checkpoint would be.
        command: what the model card says that it was made with.
        dry_run: check everything, write nothing.
        on_verified: gets the report on a Hugging Face folder, before it appears.
    """
    if not recipe.model.num_experts:
        raise UserError("model.num_experts: 0; upcycling needs at least 2 experts")
    if hf is None:
        return import_hf(recipe, dry_run=dry_run, progress=progress)
    together(lambda: single_process("upcycle --hf"))
    recipe, chosen = with_dtype(recipe)
    if progress and chosen:
        print(f"dtype {chosen}")
    dtype = recipe.model.dtype if recipe.export.dtype == "auto" else recipe.export.dtype
    return upcycle_hf(
        recipe.model.base,
        hf,
        expansion_of(recipe.model),
        settings=dataclasses.replace(recipe.export, dtype=dtype),
        on_verified=on_verified,
        command=command,
        progress=progress,
        dry_run=dry_run,
    )


@callers_torch_set_aside()
def evaluate(
    model: str | Path, *, recipe: Recipe | None = None, name: str | None = None, progress: bool = False
) -> EvaluationResult:
    """Bits per byte on held-out text; `result.save(file)` writes what `compare` and the command read.

    Args:
        model: a checkpoint, the output folder of a run, or the folder of any Hugging Face causal model.
        recipe: names the held-out text; without it a checkpoint's own does.
        name: of the model in tables; without it that of its run, or of its folder.
    """
    return plan_evaluation(model, recipe).run(name, print_progress if progress else lambda line: None)


def compare(results: Sequence[EvaluationResult | str | Path]) -> str:
    """A Markdown table of results, or of their files, the base model's first: bits per byte, and what was kept."""
    return retention_table([r if isinstance(r, EvaluationResult) else EvaluationResult.load(r) for r in results])


@callers_torch_set_aside()
def export(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    base: str | Path | None = None,
    recipe: Recipe | None = None,
    graft_delta: Sequence[str | Path] | None = None,
    check: bool = True,
    progress: bool = False,
) -> Path:
    """Write a checkpoint, or the newest of a run, as a stock Hugging Face model; returns `out_dir`.

    Args:
        base: folder of the base model; without it the recipe's.
        recipe: whose section `export` counts; without it the checkpoint's own.
        graft_delta: (BASE, INSTRUCT) adds INSTRUCT - BASE.
        check: verify the folder before it appears; what is wrong is a UserError.
    """
    single_process("export")
    folder = checkpoint_folder(str(checkpoint))
    recipe = recipe or own_recipe(folder, [f"model.base={json.dumps(str(base))}"] if base else [])
    return export_checkpoint(
        folder,
        out_dir,
        base_dir=base or recipe.model.base,
        load=recipe.model.load,
        settings=recipe.export,
        checksums=recipe.checkpoint.verify,
        graft_delta=graft_delta,
        on_verified=(lambda report: None) if check else None,
        progress=progress,
    )


@callers_torch_set_aside()
def verify(
    export_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
    base: str | Path | None = None,
    recipe: Recipe | None = None,
    logits: bool = True,
    graft_delta: Sequence[str | Path] | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Compare an export with its base model and, tensor by tensor, with its checkpoint; `.ok` is the verdict.

    Args:
        base: folder of the base model; without it the checkpoint's, or the recipe's.
        recipe: names the held-out text that logits are compared on; without it the checkpoint's own does.
        logits: compare those of the export under transformers with those of the checkpoint under Megatron.
        graft_delta: (BASE, INSTRUCT) of a grafted export.
    """
    planned = plan_verification(
        export_dir, checkpoint=checkpoint, base=base, recipe=recipe, logits=logits, graft_delta=graft_delta
    )
    return planned.run(progress=progress)
