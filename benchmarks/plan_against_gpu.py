"""What `megatron-lpr plan` says of the memory and the time of steps that a GPU made: the rows of train_step.py --json.

    python benchmarks/plan_against_gpu.py benchmarks/results/2026-11-26-nvidia-h100-grouped-products.json [--gpu h100]

Memory is the most that was allocated in a step. The time is a bound, of products at the GPU's peak.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_cases import Case, recipe_of, write_base
from step_contestants import Ours

from megatron_lpr.planning.layout import Layout
from megatron_lpr.planning.run_plan import plan_run

COLUMNS = (
    "model",
    "method",
    "precision",
    "at once",
    "held, planned and measured, GB",
    "most, planned",
    "measured",
    "",
    "a step at least, ms",
    "took",
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row that was measured and its plan, in bytes and seconds."""

    case: Case
    held: tuple[int, int]
    peak: tuple[float, int]
    seconds: tuple[float, float]

    def line(self) -> str:
        case, (planned, measured), (least, took) = self.case, self.peak, self.seconds
        return (
            f"| {case.shape}, {case.layers} layers | {case.method} | {case.precision} | {case.micro_batch} | "
            f"{self.held[0] / 1e9:.2f}, {self.held[1] / 1e9:.2f} | {planned / 1e9:.1f} | {measured / 1e9:.1f} | "
            f"{planned / measured - 1:+.0%} | {least * 1e3:,.0f} | {took * 1e3:,.0f} |"
        )


def compared(runs: Sequence[dict[str, Any]], gpu: str) -> Iterator[Compared]:
    """Of each row of this project's that was measured."""
    for row in (row for run in runs for row in run["rows"] if row["by"] == Ours.name and row["seconds"]):
        case, memory = Case(**row["case"] | {"overrides": tuple(row["case"]["overrides"])}), row["memory"]
        layout = _layout(case, gpu)
        plan = layout.memory
        peak = sum(getattr(plan, kind) for kind in plan.__dataclass_fields__)
        yield Compared(
            case=case,
            held=(
                plan.frozen + plan.trained + plan.gradients + plan.optimizer,
                sum(memory[kind] for kind in ("frozen", "trained", "gradients", "optimizer")),
            ),
            peak=(peak, memory["peak"]),
            seconds=(layout.time.total, row["seconds"]),
        )


def _layout(case: Case, gpu: str) -> Layout:
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(case, Path(folder))
        write_base(case, recipe)
        plan = plan_run(recipe, 1, gpu, most=1)
    assert plan.own is not None, plan.refused
    return plan.own


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="of train_step.py --json: one run or a list of them")
    parser.add_argument("--gpu", default="h100", help="the one that made the steps, as `plan` names it")
    options = parser.parse_args(arguments)
    tree = json.loads(options.results.read_text(encoding="utf-8"))
    print(f"| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}")
    for row in compared(tree if isinstance(tree, list) else [tree], options.gpu):
        print(row.line(), flush=True)


if __name__ == "__main__":
    main()
