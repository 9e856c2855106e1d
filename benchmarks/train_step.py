"""What a training step costs: tokens per second, TFLOP/s and MFU, where the time goes and what the memory holds, for
fixed shapes x methods x precisions, beside a plain Hugging Face style implementation of the method in the same run.

    python benchmarks/train_step.py                                 # on a GPU: all rows; on a CPU: small shapes
    python benchmarks/train_step.py --shapes 1.8B --methods stage1 --precision bf16 tensorwise --json results.json
    python benchmarks/train_step.py --shapes 135M --methods stage1 --precision bf16 --profile trace.json

Nothing is read: weights and tokens are random. Models are cut in layers (--layers) until one 80 GB GPU holds all of
`moe_full`, and in their vocabulary as much, so that the output layer keeps its weight among the others. Operations are
those of the matrix products of weights, from the closed form that the tests compare with PyTorch's counter, with the
routing of each step; attention scores are left out. MFU is their share of the GPU's dense bf16 peak, in FP8 rows too.
Parts are timed in one further step, under the profiler (step_parts.py).
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform as machine
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from step_cases import FP8, METHODS, PRECISIONS, SHAPES, Case, plan_of
from step_contestants import Contestant, Memory, Ours, Plain, leave
from step_parts import parts_of_step

from megatron_lpr.errors import UserError
from megatron_lpr.platform import device, megatron
from megatron_lpr.training.throughput import peak_tflops

COLUMNS = ("shape", "method", "precision", "by", "tokens/s", "ms/step", "TFLOP/s", "MFU", "memory GB", "parts, ms")


@dataclass(kw_only=True)
class Row:
    """What was measured of a case; `skipped` says why nothing was."""

    case: Case
    by: str
    seconds: float | None = None  # of a step
    flops: float | None = None  # of a step
    memory: Memory | None = None
    parts: dict[str, float] | None = None
    skipped: str | None = None
    failed: bool = False  # though nothing says that it cannot be run here

    @property
    def tflops(self) -> float | None:
        return self.flops / self.seconds / 1e12 if self.flops and self.seconds else None

    def mfu(self) -> float | None:
        name = torch.cuda.get_device_name() if device().type == "cuda" else ""
        peak = peak_tflops(name, "bfloat16")
        return self.tflops / peak if peak and self.tflops and self.case.precision != "fp32" else None

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        tokens_per_second = self.case.tokens / self.seconds if self.seconds else None
        figures = {"tokens_per_second": tokens_per_second, "tflops": self.tflops, "mfu": self.mfu()}
        return dataclasses.asdict(self) | figures

    def line(self) -> str:
        """Of the table."""
        case = self.case
        if self.seconds is None:
            cells = [case.shape, case.method, case.precision, self.by, f"not run: {self.skipped}", *[""] * 5]
        else:
            mfu, memory = self.mfu(), self.memory
            assert memory is not None
            held = " + ".join(
                f"{getattr(memory, kind) / 1e9:.1f}" for kind in ("frozen", "trained", "gradients", "optimizer")
            )
            cells = [
                *(case.shape, case.method, case.precision, self.by),
                f"{case.tokens / self.seconds:,.0f}",
                f"{self.seconds * 1e3:,.1f}",
                f"{self.tflops:.4g}",
                "" if mfu is None else f"{100 * mfu:.1f}%",
                held + (f", peak {memory.peak / 1e9:.1f}" if memory.peak else ""),
                ", ".join(f"{part} {1e3 * spent:.1f}" for part, spent in (self.parts or {}).items()),
            ]
        return "| " + " | ".join(cells) + " |"


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    for shape in options.shapes:
        known = SHAPES[shape]
        layers = options.layers or (known.layers if device().type == "cuda" else known.layers_on_cpu)
        whole = known.config["vocab_size"]
        for precision in options.precision:
            for method in options.methods:
                yield Case(
                    shape=shape,
                    method=method,
                    precision=precision,
                    layers=layers,
                    vocabulary=whole if options.whole_vocabulary else known.vocabulary(layers),
                    experts=options.experts or known.experts,
                    spec=options.spec,
                    samples=options.samples,
                    micro_batch=options.micro_batch,
                    seq_length=options.seq_length,
                    overrides=tuple(options.set),
                )


def measure(entries: Sequence[tuple[Case, type[Ours] | type[Plain]]], folder: Path, options) -> list[Row]:
    """Rows of contestants that are in memory together, and whose rounds are timed in turns."""
    rows, contestants = [], []
    for case, kind in entries:
        rows.append(Row(case=case, by=kind.name))
        try:
            contestants.append((rows[-1], kind(case, plan_of(case, folder))))
        except UserError as error:
            rows[-1].skipped = str(error)
    for _, contestant in contestants:
        for _ in range(options.warm_up):
            contestant.step()
    for _ in range(options.rounds):
        for row, contestant in contestants:
            time_steps(row, contestant, options.steps)
    for row, contestant in contestants:
        row.memory = contestant.memory()
        if device().type == "cuda":
            row.memory = dataclasses.replace(row.memory, peak=torch.cuda.max_memory_allocated())
        if options.parts and isinstance(contestant, Ours):
            row.parts = parts_of_step(contestant.trainer, options.profile)
    return rows


def time_steps(row: Row, contestant: Contestant, steps: int) -> None:
    """Keep the fastest round: what else the machine does weighs little."""
    wait_for_device()
    start = time.perf_counter()
    flops = sum(contestant.step() for _ in range(steps)) / steps
    wait_for_device()
    seconds = (time.perf_counter() - start) / steps
    if row.seconds is None or seconds < row.seconds:
        row.seconds, row.flops = seconds, flops


def wait_for_device() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def groups_of(cases: Sequence[Case], baseline: bool) -> Iterator[list[tuple[Case, type[Ours] | type[Plain]]]]:
    """What is measured together: on a CPU all of a shape; a GPU's memory holds one contestant at a time."""
    entries: list[tuple[Case, type[Ours] | type[Plain]]] = []
    for case in cases:
        entries.append((case, Ours))
        if baseline and case.precision in ("fp32", "bf16"):
            entries.append((case, Plain))
    if device().type == "cuda":
        yield from ([entry] for entry in entries)
    else:
        for shape in dict.fromkeys(case.shape for case in cases):
            yield [entry for entry in entries if entry[0].shape == shape]


def run(options: argparse.Namespace) -> list[Row]:
    """Measure all rows; each is printed when it is known."""
    rows: list[Row] = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as folder, megatron():
        for group in groups_of(list(cases_of(options)), options.baseline):
            try:
                found = measure(group, Path(folder), options)
            except Exception as error:  # the other rows are worth having, and what went wrong is said
                failed = not isinstance(error, torch.OutOfMemoryError)
                if failed:
                    traceback.print_exc()
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                found = [Row(case=case, by=kind.name, skipped=reason, failed=failed) for case, kind in group]
            leave()
            rows += found
            for row in found:
                print(row.line(), flush=True)
    return rows


def ratios(rows: Sequence[Row]) -> list[str]:
    """What the rows say beside each other, a sentence each."""
    by_key = {(r.case.shape, r.case.method, r.case.precision, r.by): r for r in rows if r.seconds}
    lines = []
    for (shape, method, precision, by), row in by_key.items():
        if by != Ours.name:
            continue
        name = f"{shape}, {method}, {precision}"
        if plain := by_key.get((shape, method, precision, Plain.name)):
            lines.append(f"{name}: {plain.seconds / row.seconds:.2f}x the plain implementation")
        if method.startswith("stage") and (full := by_key.get((shape, "moe_full", precision, by))):
            lines.append(
                f"{name}: {full.seconds / row.seconds:.2f}x moe_full; its operations promise "
                f"{full.flops / row.flops:.2f}x, of which that is {row.tflops / full.tflops:.2f}"
            )
        if precision == "bf16" and (fp32 := by_key.get((shape, method, "fp32", by))):
            lines.append(f"{name}: {fp32.seconds / row.seconds:.2f}x fp32")
        if precision in FP8 and (bf16 := by_key.get((shape, method, "bf16", by))):
            lines.append(f"{name}: {bf16.seconds / row.seconds:.2f}x bf16")
    return lines


def surroundings(*packages: str) -> dict[str, Any]:
    """What the figures depend on; `packages` beside those that every step does."""
    versions = {"python": machine.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("megatron-core", "transformer-engine", "triton", *packages):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"date": f"{datetime.date.today()}", "hardware": name, "versions": versions}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["1.8B", "8B", "135M"] if on_gpu else ["135M", "small-experts"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    precision = ["bf16", "tensorwise"] if on_gpu else ["fp32", "bf16"]
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=precision, help="or a recipe of FP8")
    parser.add_argument("--spec", choices=("auto", "te", "local"), default="auto")
    parser.add_argument("--layers", type=int, help="of each model; without it as many as fit")
    parser.add_argument("--whole-vocabulary", action="store_true", help="do not cut it along with the layers")
    parser.add_argument("--experts", type=int, help="frozen one included; without it 6, of 8B 3")
    parser.add_argument("--samples", type=int, default=32 if on_gpu else 8, help="of a step")
    parser.add_argument("--micro-batch", type=int, default=8 if on_gpu else 1, help="samples at once")
    parser.add_argument("--seq-length", type=int, default=1024 if on_gpu else 512)
    parser.add_argument("--warm-up", type=int, default=2 if on_gpu else 1, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=3 if on_gpu else 1, help="of a round")
    parser.add_argument("--rounds", type=int, default=1 if on_gpu else 3, help="of which the fastest counts")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="without the plain implementation")
    parser.add_argument("--no-parts", dest="parts", action="store_false", help="without the pass under the profiler")
    parser.add_argument("--profile", type=Path, help="file for torch's profiler's trace of one row")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="of the recipe")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(arguments)
    if options.profile and len(options.shapes) * len(options.methods) * len(options.precision) > 1:
        parser.error("--profile traces one row: choose one of --shapes, --methods and --precision")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, around = parse(arguments), surroundings()
    print(f"{around['date']}, {around['hardware']}; " + ", ".join(f"{k} {v}" for k, v in around["versions"].items()))
    for case in {case.shape: case for case in cases_of(options)}.values():
        shape = SHAPES[case.shape]
        print(
            f"{case.shape}: {case.layers} of {shape.whole} layers, {case.vocabulary:,} of "
            f"{shape.config['vocab_size']:,} tokens of the vocabulary, {case.experts} experts, top {shape.topk}; a "
            f"step has {case.samples} samples of {case.seq_length} tokens, {case.micro_batch} at once"
        )
    print("memory: frozen weights + weights that learn + gradients + optimizer state\n", flush=True)
    rows = run(options)
    found = ratios(rows)
    print("\n" + "\n".join(f"* {line}" for line in found))
    if options.json:
        tree = around | {"rows": [row.tree() for row in rows], "ratios": found}
        options.json.write_text(json.dumps(tree, indent=1) + "\n")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
