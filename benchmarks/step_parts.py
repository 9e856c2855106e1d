"""Where a step's time goes: what the profiler saw, by the part of the model that asked for it.

Operators of a forward pass belong to the part inside whose range they ran, the innermost if several; those of a
backward pass to the part of the forward operator whose gradient they compute. On a GPU a part's time is that of its
kernels, so that the sum of all parts is what the device has computed, and the rest of the step it was idle.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK, _BACKWARD, _ACCUMULATES = "part: ", "autograd::engine::evaluate_function: ", "AccumulateGrad"
PARTS = (
    "attention",
    "router",
    "dispatch",
    "frozen expert",
    "new experts",
    "dense FFN",
    "output and loss",
    "gradients",  # adding them up
    "optimizer",
    "data",
    "rest",
)


def parts_of_step(trainer: Any, trace: Path | None = None) -> dict[str, float]:
    """Seconds of each part in one more step of `trainer`.

    Args:
        trace: where torch's profiler shall write what it saw; Perfetto shows it.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with _marked(trainer), profile(activities=activities) as seen:
        trainer.train_step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(trace))
    return seconds_by_part(seen.events())


@contextlib.contextmanager
def _marked(trainer: Any) -> Iterator[None]:
    """Inside it the parts of a step are ranges of the profiler."""
    with contextlib.ExitStack() as stack:
        for chunk in trainer.chunks:
            for name, module in chunk.named_modules():
                if part := _part_of(name, module):
                    for handle in _mark(module, part):
                        stack.callback(handle.remove)
        optimizer, batches = trainer.optimizer, trainer.micro_batches
        update, read = optimizer.step, batches.step

        def marked_update(*args):
            with record_function(_MARK + "optimizer"):
                return update(*args)

        def marked_read(*args):
            return [_marked_reading(one) for one in read(*args)]

        stack.enter_context(mock.patch.object(optimizer, "step", marked_update))
        stack.enter_context(mock.patch.object(batches, "step", marked_read))
        yield


def _marked_reading(batches: Iterator) -> Iterator:
    while True:
        with record_function(_MARK + "data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _part_of(name: str, module: torch.nn.Module) -> str | None:
    last = name.rpartition(".")[2]
    if last == "mlp":
        return "dispatch" if hasattr(module, "router") else "dense FFN"  # what is in none of the parts inside
    if last == "experts":
        return "new experts"
    if last.isdigit() and name.endswith(f"frozen_experts.{last}"):
        return "frozen expert"
    return {"self_attention": "attention", "router": "router", "output_layer": "output and loss"}.get(last)


def _mark(module: torch.nn.Module, part: str) -> tuple:
    """Handles of the hooks that open and close a range around the forward pass of a module."""
    ranges: list[record_function] = []

    def open_range(*_: Any) -> None:
        ranges.append(record_function(_MARK + part))
        ranges[-1].__enter__()

    def close_range(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    return module.register_forward_pre_hook(open_range), module.register_forward_hook(close_range, always_call=True)


def seconds_by_part(events: Any) -> dict[str, float]:
    """Of the profiler's events; parts in which nothing ran are left out."""
    on_device = any(event.kernels for event in events)
    part_of_forward: dict[tuple[int, int], str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and event.scope == 0 and not event.name.startswith(_BACKWARD):
            # several operators may carry the number of the next node of the graph; it is the last that makes the node
            part_of_forward[event.thread, event.sequence_nr] = _enclosing_part(event) or "rest"
    microseconds: Counter[str] = Counter()
    for event in events:
        if on_device:
            spent = sum(k.duration for k in event.kernels if not k.name.startswith(_MARK))
        else:
            spent = event.self_cpu_time_total
        if spent:
            microseconds[_part(event, part_of_forward)] += spent
    return {part: microseconds[part] / 1e6 for part in PARTS if microseconds[part]}


def _enclosing_part(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(_MARK):
            return event.name.removeprefix(_MARK)
        event = event.cpu_parent
    return None


def _part(event: Any, part_of_forward: dict[tuple[int, int], str]) -> str:
    while event is not None:
        if event.name.startswith(_MARK):
            return event.name.removeprefix(_MARK)
        if event.name.startswith(_BACKWARD):
            if _ACCUMULATES in event.name:
                return "gradients"
            return part_of_forward.get((event.fwd_thread, event.sequence_nr), "rest")
        event = event.cpu_parent
    return "rest"
