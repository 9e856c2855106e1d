"""Runs of every stage in every layout on one unfair global batch, and what must be the same in all of them."""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from harness import (
    EXPANDED,
    ORIGINAL,
    OTHER_ORIGINAL,
    PADDING,
    make_batch,
    make_plan,
    make_recipe,
    scramble,
    unwrapped,
)
from sharded import Piece, assemble, gradient_pieces, weight_pieces

from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.recipe.checks import check_recipe

Sections = Mapping[str, Mapping[str, Any]]  # of a recipe
STAGES: dict[str, Sections] = {
    "stage1": {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.5}},
    "stage2": {
        "train": {"trainable": "routers"},
        "lpr": {"coeff": 0.5},
        "data": {"mixture": {"expanded": 0.5, "original": 0.5}},
    },
    "moe_full": {"train": {"trainable": "all"}, "balance": {"coeff": 0.5}},
    "dense": {"train": {"trainable": "all"}, "model": {"num_experts": 0}},
}
NUMBERS = ("ntp_loss", "balance_loss", "lpr_loss", "grad_norm", "tokens")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage in a layout, and the layout in which it goes on from a checkpoint after the first step."""

    stage: str
    changes: Sections = dataclasses.field(default_factory=dict)
    resume_at: Sections | None = None
    steps: int = 2
    chunk_bytes: int | None = None  # of logits at once in the loss; as in a real run a toy's are one chunk
    experts: str | None = None  # new ones "grouped": in torch's grouped product; "looped": in Megatron's loop


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run computed: metrics of every step, and the whole gradients of the first."""

    metrics: list[dict[str, Any]]
    gradients: dict[str, np.ndarray]


def unfair_batch(length: int = 16):
    """Eight sequences: most without an original token, one with a single one, three padded.

    Of two context-parallel ranks the first has positions 0-3 and 12-15 of 16: either has sequences without an original
    token of which the other has some, and sequences that are nothing but padding.
    """
    return make_batch(
        [
            [(EXPANDED, length)],
            [(EXPANDED, 7), (ORIGINAL, 1), (EXPANDED, length - 8)],
            [(ORIGINAL, 3), (PADDING, length - 3)],
            [(EXPANDED, length)],
            [(EXPANDED, 9), (PADDING, length - 9)],
            [(OTHER_ORIGINAL, length)],
            [(EXPANDED, length)],
            [(EXPANDED, 5), (ORIGINAL, 4), (PADDING, length - 9)],
        ]
    )


def recipe_of(base: Path, stage: str, output: Path, changes: Sections):
    """A stage with one frozen and four new experts, micro-batches of one sample, and `changes` on top."""
    common = {
        "model": {"num_experts": 5},
        "train": {"micro_batch_size": 1, "steps": 20},
        # far above rounding: Adam would make a whole step of the noise in a gradient that is next to nothing
        "optimizer": {"lr": 1e-2, "clip_grad": 1e9, "eps": 1e-3},
        "checkpoint": {"final_optimizer": False, "keep": 0},
    }
    sections: dict[str, dict[str, Any]] = {}
    for layer in (common, STAGES[stage], changes):
        for name, section in layer.items():
            sections[name] = sections.get(name, {}) | dict(section)
    return make_recipe(base, unfair_batch(), output, sections)


def trainer_of(base: Path, stage: str, output: Path, changes=None, *, source=None, resume=None, world_size: int = 1):
    """A trainer ready to make a step: fresh, with weights from the checkpoint `source`, or resuming from `resume`."""
    from megatron_lpr.training.train import Trainer

    recipe = recipe_of(base, stage, output, changes or {})
    plan = make_plan(recipe, unfair_batch(), world_size=world_size, source=None if stage == "dense" else source)
    check_recipe(recipe, plan.arch, world_size)
    if resume is not None:
        plan = dataclasses.replace(plan, resume=resume, state=read_run_state(resume))
    trainer = Trainer(plan)
    for chunk in trainer.chunks:
        chunk.train()
    return trainer


def run_case(base: Path, case: Case, source: Path, output: Path, world_size: int) -> tuple[list[dict], list[Piece]]:
    """The metrics of each step, and this rank's pieces of the first step's gradients."""
    from megatron_lpr.model import expert_products, grouped_experts, output_layer
    from megatron_lpr.platform import leave_layout

    with (
        mock.patch.object(output_layer, "CHUNK_BYTES", case.chunk_bytes or output_layer.CHUNK_BYTES),
        mock.patch.object(grouped_experts, "computes_at_once", lambda config: case.experts != "looped"),
        mock.patch.object(expert_products, "in_one_kernel", lambda x: case.experts == "grouped"),
    ):
        trainer = trainer_of(base, case.stage, output, case.changes, source=source, world_size=world_size)
        metrics = [trainer.train_step()]
        gradients = gradient_pieces(trainer)
        if case.resume_at is not None:
            trainer.save()
            del trainer
            leave_layout()
            resume = output / "checkpoints/step_00000001"
            trainer = trainer_of(base, case.stage, output, case.resume_at, resume=resume, world_size=world_size)
        metrics += [trainer.train_step() for _ in range(1, case.steps)]
        del trainer
        leave_layout()
    names = (*NUMBERS, "ntp_loss_per_language", "router")
    return [{name: step.get(name) for name in names} for step in metrics], gradients


def loaded_weights(base: Path, changes: Sections) -> list[Piece]:
    """This rank's pieces of the model as it is upcycled from the Hugging Face folder in a layout."""
    from megatron_lpr.families import read_architecture
    from megatron_lpr.model.builder import init_model_parallel
    from megatron_lpr.model.load.weights import fill_weights
    from megatron_lpr.model.sharding import build_frozen
    from megatron_lpr.platform import leave_layout
    from megatron_lpr.platform.shards import own_part

    recipe, arch = recipe_of(base, "stage1", base, changes), read_architecture(base)
    init_model_parallel(recipe.parallel)
    chunks = build_frozen(recipe, arch)
    for chunk in chunks:
        for parameter in chunk.parameters():
            own_part(parameter).detach().fill_(np.nan)
    fill_weights(recipe, arch, chunks, None)
    pieces = weight_pieces(chunks)
    leave_layout()
    return pieces


def write_source(base: Path, output: Path) -> Path:
    """A checkpoint in which every expert has weights of its own."""
    trainer = trainer_of(base, "moe_full", output)
    scramble(unwrapped(trainer))
    trainer.save(with_optimizer=False)
    return output / "checkpoints/step_00000000"


def run_cases(world_size: int, work: list[tuple[Path, Path, list[Case], list[Sections]]]) -> list[tuple[list, list]]:
    """On one rank, for each (base, source, cases, loads): `run_case` of the cases, `loaded_weights` of the loads."""
    from megatron_lpr.platform import megatron

    done = []
    with megatron():
        gc.freeze()  # what is imported stays: collections between the cases need not look at it
        for base, source, cases, loads in work:
            outputs = [source / f"{world_size}_{i}" for i in range(len(cases))]
            weights = [loaded_weights(base, changes) for changes in loads]
            runs = [run_case(base, case, source, out, world_size) for case, out in zip(cases, outputs, strict=True)]
            done.append((runs, weights))
    return done


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some cases of a comparison, and layouts in which its base is loaded, by name."""

    comparison: "Comparison"
    cases: list[str]
    loads: dict[str, Sections] = dataclasses.field(default_factory=dict)


def run_parts(on_ranks, world_size: int, parts: list[Part]) -> None:
    """One launch for all; each comparison takes what is its own."""
    work = [
        (it.comparison.base, it.comparison.source, [it.comparison.cases[n] for n in it.cases], list(it.loads.values()))
        for it in parts
    ]
    for part, ranks in zip(parts, zip(*on_ranks(run_cases, world_size, world_size, work), strict=True), strict=True):
        for name, outcomes in zip(part.cases, zip(*(runs for runs, _ in ranks), strict=True), strict=True):
            part.comparison.take(name, outcomes)
        for name, pieces in zip(part.loads, zip(*(weights for _, weights in ranks), strict=True), strict=True):
            part.comparison.loaded[name] = assemble(list(pieces), exact=True)


def selected(request) -> set[str]:
    """The parameter `name` of the tests of a module that this session runs: `-k tp2` need not run everything."""
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    return {item.callspec.params["name"] for item in items if "name" in item.callspec.params}


class Comparison:
    """Cases and loads on any number of ranks against one process, which takes the whole batch at once.

    Without Transformer Engine: what is compared with it may have it.
    """

    def __init__(self, base: Path, folder: Path, cases: dict[str, Case]) -> None:
        from megatron_lpr.platform import leave_layout, megatron

        self.base = base
        self.outcomes: dict[str, Outcome] = {}
        self.expected: dict[str, Outcome] = {}
        self.loaded: dict[str, dict[str, np.ndarray]] = {}
        self.cases = cases
        whole = {"train": {"micro_batch_size": len(unfair_batch().tags_BS)}, "model": {"spec": "local"}}
        with megatron():
            self.source = write_source(base, folder)
            leave_layout()
            for stage in {case.stage for case in cases.values()}:
                steps = max(case.steps for case in cases.values() if case.stage == stage)
                metrics, found = run_case(
                    base, Case(stage=stage, changes=whole, steps=steps), self.source, folder / "expected", 1
                )
                self.expected[stage] = Outcome(metrics=metrics, gradients=assemble([found]))
            self.expected_weights = assemble([loaded_weights(base, {})], exact=True)

    def take(self, name: str, ranks: Sequence[tuple[list[dict], list[Piece]]]) -> None:
        """What `run_case` gave on each rank."""
        assert all(metrics == ranks[0][0] for metrics, _ in ranks), f"{name}: metrics differ between ranks"
        self.outcomes[name] = Outcome(metrics=ranks[0][0], gradients=assemble([found for _, found in ranks]))

    def check(self, name: str) -> None:
        """Losses, gradient norm and router statistics of every step, and every gradient of the first, to rounding.

        Relative 1e-5 for the first two steps (the second shows what the optimizer did), 1e-4 for those after them.
        """
        got, expected = self.outcomes[name], self.expected[self.cases[name].stage]
        for step, (mine, theirs) in enumerate(zip(got.metrics, expected.metrics, strict=False), start=1):
            tolerance = 1e-5 if step <= 2 else 1e-4
            for number in NUMBERS:
                if theirs[number] is None:
                    assert mine[number] is None, (name, step, number)
                else:
                    error = abs(mine[number] - theirs[number])
                    assert error <= tolerance * abs(theirs[number]), (name, step, number, mine[number], theirs[number])
            ours, expected_loss = mine["ntp_loss_per_language"], theirs["ntp_loss_per_language"]
            assert ours == pytest.approx(expected_loss, rel=tolerance), (name, step, ours, expected_loss)
        assert (got.metrics[0]["router"] is None) == (expected.metrics[0]["router"] is None)
        for language, record in (expected.metrics[0]["router"] or {}).items():
            for statistic, values in record.items():
                mine = got.metrics[0]["router"][language][statistic]
                np.testing.assert_allclose(mine, values, rtol=1e-5, atol=1e-6, err_msg=f"{name} {language} {statistic}")
        assert got.gradients.keys() == expected.gradients.keys(), name
        for key, gradient in expected.gradients.items():
            size = np.abs(gradient).max()
            assert size > 0, key
            np.testing.assert_allclose(got.gradients[key], gradient, rtol=0, atol=1e-5 * size, err_msg=f"{name}: {key}")

    def check_loaded(self, name: str) -> None:
        """Every weight as one process loads it, bit for bit."""
        got = self.loaded[name]
        assert got.keys() == self.expected_weights.keys()
        for key, weight in self.expected_weights.items():
            np.testing.assert_array_equal(got[key], weight, err_msg=f"{name}: {key}")
