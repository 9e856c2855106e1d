"""Looks for layouts that fit: all parallel sizes that the model and the ranks allow, as far as they make sense.

Sense: tensor parallelism stays inside a node (arXiv 2104.04473, takeaway 1), context parallelism waits until sequences
are long, experts are cut where the recipe cuts them, and further only where nothing fits otherwise. What the recipe
itself says is among them. The global batch stays the recipe's, so that the numbers do.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.model.rank.frozen import shards_frozen
from megatron_lpr.model.rank.place import Place
from megatron_lpr.planning.hardware import GPU
from megatron_lpr.planning.layout import Layout, Layouts
from megatron_lpr.planning.operations import model_operations
from megatron_lpr.planning.schedule import bubble
from megatron_lpr.planning.step_time import at_peak
from megatron_lpr.recipe.fp8 import check_fp8, lacking_to_shard
from megatron_lpr.recipe.layout import check_batch, check_layout, check_seq_length
from megatron_lpr.recipe.settings import ParallelConfig, Recipe, TrainConfig

_CONTEXT_FROM = 4096  # tokens that a context-parallel rank keeps at least
_MOST_SAMPLES = 16  # of a micro-batch
_ROUNDING = 1e-6  # of a bound
ALIKE = 0.01  # bounds that differ by less of the lowest tell no layout from another


@dataclass(frozen=True, kw_only=True)
class Found:
    """best: layouts that fit, one of each set of sizes, by their bounds; of those alike to the lowest the least memory.

    nearest: where none fits, the one that lacks least.
    """

    best: list[Layout]
    nearest: Layout | None


def search(recipe: Recipe, arch: Architecture, world_size: int, gpu: GPU, most: int) -> Found:
    """The `most` best."""
    own, nearest = recipe.parallel.expert_tensor, list[Layout]()
    further = [cut for cut in _divisors(gpu.per_node, gpu.per_node) if cut > own and cut % own == 0]
    for cut in [own, *further] if recipe.model.num_experts else [own]:
        sizes = dataclasses.replace(recipe.parallel, expert_tensor=cut)
        found = _search(dataclasses.replace(recipe, parallel=sizes), arch, world_size, gpu, most)
        if found.best:
            return Found(best=_roomiest_first(found.best), nearest=None)
        nearest += [found.nearest] if found.nearest else []
    return Found(best=[], nearest=min(nearest, key=lambda layout: layout.memory.total, default=None))


def _search(recipe: Recipe, arch: Architecture, world_size: int, gpu: GPU, most: int) -> Found:
    """Of those whose experts are cut as the recipe's."""
    assert recipe.train is not None
    best: list[Layout] = []
    nearest: tuple[int, Layouts, TrainConfig] | None = None
    computing = least_seconds(recipe, arch, world_size, gpu)
    for sizes in _sizes(recipe, arch, world_size, gpu):
        if len(best) == most and computing * (1 + least_bubble(recipe.train, sizes, world_size)) > best[-1].time.total:
            continue
        if any(one.sizes in (sizes, dataclasses.replace(sizes, frozen="replicated")) for one in best):
            continue  # the recipe's own, once more, or sharding would save memory that is not lacking
        layouts = Layouts(dataclasses.replace(recipe, parallel=sizes), arch, world_size, gpu)
        found: Layout | None = None
        for train in batches(layouts.recipe, arch, world_size):
            lacks = layouts.least - gpu.usable  # without the batch, which is reckoned where it may matter
            if lacks <= 0 or (not best and (nearest is None or lacks < nearest[0])):
                lacks = layouts.memory(train)[0].total - gpu.usable
            if lacks <= 0:
                layout = layouts.layout(train)
                if found is None or layout.time.total < found.time.total * (1 - _ROUNDING):
                    found = layout
            elif not best and (nearest is None or lacks < nearest[0]):
                nearest = lacks, layouts, train
        if found:
            best = sorted([*best, found], key=lambda layout: layout.time.total)[:most]
    return Found(best=best, nearest=nearest[1].layout(nearest[2]) if nearest and not best else None)


def _roomiest_first(best: list[Layout]) -> list[Layout]:
    """Of those whose bounds are alike to the lowest."""
    alike = [layout for layout in best if layout.time.total <= best[0].time.total * (1 + ALIKE)]
    return sorted(alike, key=lambda layout: layout.memory.total) + best[len(alike) :]


def least_seconds(recipe: Recipe, arch: Architecture, world_size: int, gpu: GPU) -> float:
    """Of a step in which every GPU computes all the time, and nothing twice."""
    return at_peak(model_operations(recipe, arch), gpu, recipe.model.dtype) / world_size


def least_bubble(train: TrainConfig, sizes: ParallelConfig, world_size: int) -> float:
    """With the smallest micro-batches."""
    place = Place(sizes, world_size, 0)
    return bubble(place, max(1, train.global_batch_size // place.data))


def _sizes(recipe: Recipe, arch: Architecture, world_size: int, gpu: GPU) -> Iterator[ParallelConfig]:
    assert recipe.train is not None and recipe.data is not None
    new = recipe.model.num_experts - recipe.model.num_frozen_experts
    experts = _divisors(new, world_size) if recipe.model.num_experts else [1]
    contexts = [n for n in (1, 2, 4, 8, 16) if n == 1 or recipe.data.seq_length // n >= _CONTEXT_FROM]
    can_shard = recipe.train.trainable != "all" and not lacking_to_shard(recipe.fp8)
    spread: list[Literal["replicated", "sharded"]] = ["replicated", "sharded"] if can_shard else ["replicated"]
    tensors = _divisors(arch.num_query_groups, gpu.per_node)
    found = (
        dataclasses.replace(staged, tensor=tensor, context=context, expert=expert, frozen=frozen)
        for frozen, context, tensor, staged, expert in itertools.product(
            spread, contexts, tensors, _staged(recipe.parallel, arch.num_layers, world_size), experts
        )
        if world_size % (tensor * staged.pipeline * context) == 0 == world_size % (staged.pipeline * expert)
    )
    for sizes in itertools.chain([recipe.parallel], found):
        laid_out = dataclasses.replace(recipe, parallel=sizes)
        try:
            check_layout(laid_out, arch, world_size)
            check_seq_length(recipe.data.seq_length, sizes, arch)
        except UserError:
            continue
        if sizes.frozen != "auto":
            yield sizes
        elif shards_frozen(laid_out, arch, world_size):
            yield dataclasses.replace(sizes, frozen="sharded")
        else:
            yield dataclasses.replace(sizes, frozen="replicated")


def _staged(sizes: ParallelConfig, layers: int, world_size: int) -> Iterator[ParallelConfig]:
    """Stages and their chunks: one, two, four, or what divides the layers of a stage that neither two nor four do."""
    yield from _with_stages(sizes, layers, 1, 1)
    for stages in _divisors(world_size, layers)[1:]:
        one, two, four, *others = (_with_stages(sizes, layers, stages, chunks) for chunks in (1, 2, 4, 3, 5, 7))
        yield from [*one, *two, *four]
        if not two and not four:
            yield from [*itertools.chain(*others)][:1]


def _with_stages(sizes: ParallelConfig, layers: int, stages: int, chunks: int) -> list[ParallelConfig]:
    """One or none. Where stages cannot all have the same, the ends have less (as Llama 3's, arXiv 2407.21783)."""
    each = -(-layers // (stages * chunks))  # layers of a chunk
    lacking, rest = divmod(each * stages * chunks - layers, chunks)
    first, last = each - lacking // 2, each - (lacking - lacking // 2)
    if rest or first < 1 or last < 1 or (lacking and layers % stages == 0):
        return []
    staged = dataclasses.replace(
        sizes,
        pipeline=stages,
        virtual_pipeline=chunks,
        first_stage_layers=first * chunks if first < each else None,
        last_stage_layers=last * chunks if last < each else None,
    )
    return [staged]


def batches(recipe: Recipe, arch: Architecture, world_size: int) -> Iterator[TrainConfig]:
    """Micro-batches, each with every mode of recomputation; the cheapest mode that fits will win.

    The largest first: of two with one bound it wins, for what a bound leaves out, launching kernels, it has less of.
    """
    assert recipe.train is not None
    train, sizes = recipe.train, recipe.parallel
    data = Place(sizes, world_size, 0).data
    for samples in reversed(_divisors(max(1, train.global_batch_size // data), _MOST_SAMPLES)):
        for recompute in ("none", "selective", "full"):
            batch = dataclasses.replace(train, micro_batch_size=samples, recompute=recompute)
            try:
                check_batch(batch, sizes, world_size)
                check_fp8(dataclasses.replace(recipe, train=batch), arch)
            except UserError:
                continue
            yield batch


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
