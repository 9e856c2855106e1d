"""What is printed of a plan: for people, and for machines."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_lpr.planning.layout import Layout
from megatron_lpr.planning.links import OnLinks, on_links
from megatron_lpr.planning.moves import counted
from megatron_lpr.planning.operations import model_operations
from megatron_lpr.planning.run_plan import RunPlan
from megatron_lpr.planning.search import ALIKE
from megatron_lpr.recipe.layout import layers_of_chunks

KINDS = ("frozen", "trained", "casts", "gradients", "optimizer", "gathered", "activations", "logits", "working")
_STAGES = ("pipeline", "virtual_pipeline", "first_stage_layers", "last_stage_layers")
_SIZES = ("tensor", *_STAGES, "context", "expert", "expert_tensor", "frozen")


def text(plan: RunPlan) -> str:
    return "\n".join([*_head(plan), "", *_own(plan), "", *_table(plan)])


def _head(plan: RunPlan) -> Iterator[str]:
    size, gpu = plan.size, plan.gpu
    total = size.trainable + size.frozen
    yield f"{plan.world_size} x {gpu.name}: {_size(gpu.memory)} each, of which {_size(gpu.usable)} are planned with"
    yield f"parameters   {total:,}: {size.trainable:,} trainable, {size.frozen:,} frozen"
    yield f"FLOPs        {flops_per_token(plan) / 1e9:,.1f} billion per token, forward and backward"
    partial = plan.recipe.model.num_experts and not plan.recipe.checkpoint.whole
    kept = size.weight_bytes["over base" if partial else "whole"]
    yield f"checkpoint   {_size(kept)}, {_size(kept + size.optimizer_bytes)} with the optimizer's state"


def _own(plan: RunPlan) -> Iterator[str]:
    if plan.own is None:
        yield f"the recipe's own layout cannot be: {plan.refused}"
        return
    yield f"the recipe's own layout, {_sizes(plan.own)}: {_verdict(plan, plan.own)}"
    yield from _memory(plan, plan.own)
    yield from _links(plan, plan.own)


def _memory(plan: RunPlan, layout: Layout) -> Iterator[str]:
    yield f"  memory of rank {layout.rank.place.rank}, the fullest"
    for kind in KINDS:
        if held := vars(layout.memory)[kind]:
            yield f"    {kind:12}{_size(held):>10}"
    modes = []
    for mode in ("none", "selective", "full"):
        memory = layout.rank.memory(dataclasses.replace(layout.train, recompute=mode))
        modes.append(f"{mode} {_size(memory.activations + memory.working)}")
    yield f"    activations and work with recompute: {', '.join(modes)}"


def _links(plan: RunPlan, layout: Layout) -> Iterator[str]:
    place = layout.slowest.place
    yield f"  what rank {place.rank}, of the slowest stage, sends in a step"
    for key, calls, carried, over in _rows(plan, layout):
        row = f"    {key:28}{calls:>8,} calls {_size(carried):>10}"
        yield f"{row}   inside a node {_size(over.inside):>10}, between nodes {_size(over.between):>10}"
    time = layout.time
    parts = ("compute", "waiting", "gathering", "gradients", "bubble")
    named = ", ".join(f"{part} {_digits(vars(time)[part])}" for part in parts if vars(time)[part] > 0.002 * time.total)
    yield f"  a step takes {_digits(time.total)} s at least ({named})"


def _digits(seconds: float) -> str:
    """The first three."""
    return f"{float(f'{seconds:.3g}'):,g}"


def _rows(plan: RunPlan, layout: Layout) -> Iterator[tuple[str, int, int, OnLinks]]:
    place = layout.slowest.place
    over: dict[tuple[str, str], OnLinks] = {}
    for move in layout.moves:
        key = (move.collective, move.purpose or move.ranks)
        over[key] = over.get(key, OnLinks()) + on_links(move, place, plan.gpu)
    for key, amount in counted(layout.moves).items():
        yield f"{key[0]}, {key[1]}", amount.calls, amount.bytes, over[key]


def _table(plan: RunPlan) -> Iterator[str]:
    found = plan.found
    if not found.best:
        if found.nearest is None:
            yield (
                "no other layout is possible: the same stands against each, or nothing divides the GPUs, the model and "
                "train.global_batch_size"
            )
            return
        yield f"no layout fits; the nearest, {_sizes(found.nearest)}: {_verdict(plan, found.nearest)}"
        yield from _memory(plan, found.nearest)
        return
    yield f"layouts that fit, the lowest bound of a step first; of those within {ALIKE:.0%} of it the least memory"
    yield ""
    titles = ("tensor", "pipeline", "virtual", "ends", "context", "expert", "frozen", "micro batch", "recompute")
    yield f"| {' | '.join(titles)} | memory, GB | step, s |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for layout in found.best:
        s, train = layout.sizes, layout.train
        cells: list[object] = [
            s.tensor,
            s.pipeline,
            s.virtual_pipeline,
            _ends(layout),
            s.context,
            s.expert if s.expert_tensor == 1 else f"{s.expert} x {s.expert_tensor}",
            s.frozen,
            train.micro_batch_size,
        ]
        cells += [train.recompute, f"{layout.memory.total / 1e9:.1f}", f"{layout.time.total:.2f}"]
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    yield "lines for the recipe, of the first:"
    yield ""
    yield from lines_to_paste(found.best[0])


def _ends(layout: Layout) -> str:
    """The layers of the first and the last stage where not all have the same."""
    chunks = layout.rank.place.sizes.virtual_pipeline
    layers = [len(chunk) for chunk in layers_of_chunks(layout.sizes, layout.rank.arch.num_layers)]
    return "" if len(set(layers)) == 1 else f"{layers[0] * chunks}, {layers[-1] * chunks}"


def lines_to_paste(layout: Layout) -> Iterator[str]:
    """A layout as YAML."""
    yield "parallel:"
    for name in _SIZES:
        value = getattr(layout.sizes, name)
        yield f"  {name}: {'null' if value is None else value}"
    yield "train:"
    yield f"  micro_batch_size: {layout.train.micro_batch_size}"
    yield f"  recompute: {layout.train.recompute}"


def tree(plan: RunPlan) -> dict[str, Any]:
    """For JSON; bytes and seconds."""
    return {
        "gpus": plan.world_size,
        "gpu": dataclasses.asdict(plan.gpu),
        "trainable_parameters": plan.size.trainable,
        "frozen_parameters": plan.size.frozen,
        "flops_per_token": flops_per_token(plan),
        "checkpoint_bytes": {name: plan.size.checkpoint_bytes(name) for name in plan.size.weight_bytes},
        "refused": plan.refused,
        "own": _layout_tree(plan, plan.own) if plan.own else None,
        "layouts": [_layout_tree(plan, layout) for layout in plan.found.best],
        "nearest": _layout_tree(plan, plan.found.nearest) if plan.found.nearest else None,
    }


def _layout_tree(plan: RunPlan, layout: Layout) -> dict[str, Any]:
    return {
        "parallel": {name: getattr(layout.sizes, name) for name in _SIZES},
        "train": {"micro_batch_size": layout.train.micro_batch_size, "recompute": layout.train.recompute},
        "rank": layout.rank.place.rank,
        "memory": vars(layout.memory) | {"total": layout.memory.total},
        "fits": layout.memory.total <= plan.gpu.usable,
        "seconds": dataclasses.asdict(layout.time),
        "traffic": [
            {"what": what, "calls": calls, "bytes": carried, **dataclasses.asdict(over)}
            for what, calls, carried, over in _rows(plan, layout)
        ],
    }


def flops_per_token(plan: RunPlan) -> float:
    """What the model needs, attention scores included, nothing computed twice."""
    train, data = plan.recipe.train, plan.recipe.data
    assert train is not None and data is not None
    return model_operations(plan.recipe, plan.arch).total / (train.global_batch_size * data.seq_length)


def _verdict(plan: RunPlan, layout: Layout) -> str:
    lacks = layout.memory.total - plan.gpu.usable
    if lacks <= 0:
        return f"fits, {_size(layout.memory.total)} of {_size(plan.gpu.usable)}"
    held = 0
    for kind in KINDS:
        held += vars(layout.memory)[kind]
        if held > plan.gpu.usable:
            break
    over = f"{_size(layout.memory.total)}, {_size(lacks)} more than {_size(plan.gpu.usable)}"
    first = f"from the top down, the first that does not fit is {kind}, by {_size(held - plan.gpu.usable)}"
    return f"does not fit: {over}; {first}"


def _sizes(layout: Layout) -> str:
    s = layout.sizes
    given = {name: getattr(s, name) for name in _SIZES if getattr(s, name) not in (1, None)}
    sizes = ", ".join(f"{name} {value}" for name, value in given.items())
    return f"{sizes}, micro batch {layout.train.micro_batch_size}, recompute {layout.train.recompute}"


def _size(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e7 or not number else f"{number / 1e6:,.2f} MB"
