"""How a run is spread over its ranks: what the parallel sizes must divide, and what they ask of each other."""

import importlib.util

import torch

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.recipe.settings import ParallelConfig, Recipe, TrainConfig


def check_layout(recipe: Recipe, arch: Architecture, world_size: int) -> None:
    """Whether the parallel sizes divide the model, its experts and the ranks, and can work together.

    Raises:
        UserError: names the size, what it does not divide, and the nearest that do.
    """
    sizes, model = recipe.parallel, recipe.model
    if model.num_experts:
        new = model.num_experts - model.num_frozen_experts
        _divides(
            "parallel.expert", sizes.expert, new, "the number of new experts (model.num_experts minus frozen ones)"
        )
    if sizes.virtual_pipeline > 1 and sizes.pipeline == 1:
        raise UserError(f"parallel.virtual_pipeline: {sizes.virtual_pipeline} needs parallel.pipeline above 1")
    _divides("parallel.tensor", sizes.tensor, arch.num_attention_heads, "the number of attention heads")
    _divides("parallel.tensor", sizes.tensor, arch.num_query_groups, "the number of key/value heads")
    _divides("parallel.tensor", sizes.tensor, arch.ffn_hidden_size, "the FFN width")
    _divides("parallel.expert_tensor", sizes.expert_tensor, arch.ffn_hidden_size, "the FFN width")
    _check_layer_split(sizes, arch.num_layers)
    if arch.mlp_only_layers and recipe.train is not None and recipe.train.trainable != "all":
        _check_something_learns(sizes, arch)
    ranks = sizes.tensor * sizes.context * sizes.pipeline
    several = "; torchrun or srun starts several ranks" if world_size == 1 else ""
    _divides("parallel.tensor x context x pipeline", ranks, world_size, "the number of ranks", several)
    experts = sizes.expert_tensor * sizes.expert * sizes.pipeline
    _divides("parallel.expert_tensor x expert x pipeline", experts, world_size, "the number of ranks", several)
    _check_frozen(recipe, world_size)
    _check_dispatcher(recipe)
    _check_overlap(sizes)
    if sizes.overlap_frozen == "on":
        _check_overlap_frozen(recipe)


def check_layout_here(recipe: Recipe) -> None:
    """Whether this machine has what the settings of a checked layout compute with: CUDA, DeepEP. UserError."""
    on_gpu = torch.cuda.is_available()
    if recipe.parallel.overlap_frozen == "on" and not on_gpu:
        raise UserError("parallel.overlap_frozen: on needs CUDA, whose streams run beside each other; leave it out")
    if not _uses_flex(recipe):
        return
    if not on_gpu:
        raise UserError("parallel.dispatcher: flex needs CUDA (it runs on DeepEP); use alltoall or allgather")
    if importlib.util.find_spec("deep_ep") is None:
        raise UserError("parallel.dispatcher: flex needs the package deep_ep (DeepEP); install it, or use alltoall")


def check_seq_length(seq_length: int, sizes: ParallelConfig, arch: Architecture) -> None:
    """Whether the tensor- and context-parallel ranks can share a sequence, and the model has so many positions."""
    # a context-parallel rank has two chunks of the sequence
    parts, of = sizes.tensor, f"parallel.tensor ({sizes.tensor})"
    if sizes.context > 1:
        parts, of = 2 * sizes.context * parts, f"2 x parallel.context ({sizes.context}) x {of}"
    if seq_length % parts:
        raise UserError(f"data.seq_length: {seq_length} is no multiple of {of}; {nearest_multiples(seq_length, parts)}")
    positions = arch.max_position_embeddings
    if seq_length > positions:
        way_out = f"choose {positions // parts * parts} at most" if parts <= positions else "use smaller sizes"
        raise UserError(
            f"data.seq_length: {seq_length}, but the model has {positions} positions (max_position_embeddings of its "
            f"config.json); {way_out}"
        )


def check_batch(train: TrainConfig, sizes: ParallelConfig, world_size: int) -> None:
    """Whether the data-parallel ranks, and their pipelines, can share the samples of a step."""
    data_parallel = world_size // (sizes.tensor * sizes.context * sizes.pipeline)
    samples = train.micro_batch_size * data_parallel
    if train.global_batch_size % samples:
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of micro_batch_size x data-parallel "
            f"size = {train.micro_batch_size} x {data_parallel}; {nearest_multiples(train.global_batch_size, samples)}"
        )
    if sizes.virtual_pipeline > 1 and (train.global_batch_size // samples) % sizes.pipeline:
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of micro_batch_size x data-parallel "
            f"size x pipeline = {train.micro_batch_size} x {data_parallel} x {sizes.pipeline}, as "
            f"parallel.virtual_pipeline needs; {nearest_multiples(train.global_batch_size, samples * sizes.pipeline)}"
        )


def _check_layer_split(sizes: ParallelConfig, num_layers: int) -> None:
    chunks = sizes.virtual_pipeline
    given = {name: getattr(sizes, name) for name in ("first_stage_layers", "last_stage_layers")}
    given = {f"parallel.{name}": layers for name, layers in given.items() if layers is not None}
    if not given:
        stages = sizes.pipeline * chunks
        _divides("parallel.pipeline x parallel.virtual_pipeline", stages, num_layers, "the number of layers")
        return
    for field, layers in given.items():
        if sizes.pipeline == 1:
            raise UserError(f"{field}: {layers} needs parallel.pipeline above 1")
        if layers % chunks:
            raise UserError(f"{field}: {layers}; a multiple of parallel.virtual_pipeline ({chunks})")
    taken, others = sum(given.values()), sizes.pipeline - len(given)
    least, share = len(given) * chunks, others * chunks
    valid = [n for n in range(least, num_layers + 1, chunks) if _shared_equally(num_layers - n, share)]
    if not valid:
        raise UserError(
            f"parallel.pipeline x parallel.virtual_pipeline: {sizes.pipeline} x {chunks} model chunks cannot share "
            f"{num_layers} layers, whatever {' and '.join(given)}; choose smaller ones"
        )
    if taken not in valid:
        near = sorted(sorted(valid, key=lambda n: (abs(n - taken), n))[:2])
        raise UserError(
            f"{' + '.join(given)}: {taken} of {num_layers} layers leave {num_layers - taken} for {others} other "
            f"pipeline stage(s) of {chunks} model chunk(s), which take equal shares; the nearest valid "
            f"{'are' if len(near) > 1 else 'is'} {' and '.join(map(str, near))}"
        )


def _check_something_learns(sizes: ParallelConfig, arch: Architecture) -> None:
    """A model chunk of frozen layers alone has an output without a gradient, where the first backward pass fails."""
    for layers in layers_of_chunks(sizes, arch.num_layers):
        if not set(layers) & set(arch.moe_layers()):
            raise UserError(
                f"model.mlp_only_layers: {list(arch.mlp_only_layers)} leave nothing to learn in the pipeline stage of "
                f"layers {layers[0]} to {layers[-1]}; use fewer stages or another split (parallel.first_stage_layers)"
            )


def layers_of_chunks(sizes: ParallelConfig, num_layers: int) -> list[range]:
    """The layers of every model chunk, in the order of the layers."""
    first, last = sizes.first_stage_layers, sizes.last_stage_layers
    taken = (first or 0) + (last or 0)
    share = (num_layers - taken) // max(1, sizes.pipeline - (first is not None) - (last is not None))
    stages = [share] * sizes.pipeline
    stages[0], stages[-1] = first or stages[0], last or stages[-1]
    chunks, start = [], 0
    for layers in stages * sizes.virtual_pipeline:
        chunks.append(range(start, start + layers // sizes.virtual_pipeline))
        start = chunks[-1].stop
    return chunks


def _shared_equally(layers: int, chunks: int) -> bool:
    return layers >= chunks and layers % chunks == 0 if chunks else layers == 0


def _check_overlap(sizes: ParallelConfig) -> None:
    if sizes.overlap_param_gather:
        for field in ("distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(sizes, field):
                raise UserError(f"parallel.overlap_param_gather: true needs parallel.{field}: true")


def _check_overlap_frozen(recipe: Recipe) -> None:
    if recipe.train is not None and recipe.train.trainable == "all":
        raise UserError("parallel.overlap_frozen: on is not written for train.trainable: all; leave it out")
    if recipe.parallel.frozen != "replicated":
        raise UserError(
            "parallel.overlap_frozen: on needs parallel.frozen: replicated, for what is gathered is let go of before "
            "a second stream is done with it; set that, or leave it out"
        )


def _check_frozen(recipe: Recipe, world_size: int) -> None:
    if recipe.parallel.frozen != "sharded" or recipe.train is None:
        return
    if recipe.train.trainable == "all":
        raise UserError(
            "parallel.frozen: sharded has no effect with train.trainable: all, which freezes nothing; leave it out"
        )
    if world_size == recipe.parallel.pipeline:
        raise UserError(
            f"parallel.frozen: sharded has no ranks to spread weights over, for each of {world_size} rank(s) is a "
            "pipeline stage of its own; leave it out, or use more ranks"
        )


def _check_dispatcher(recipe: Recipe) -> None:
    sizes = recipe.parallel
    if _uses_flex(recipe) and sizes.expert * sizes.expert_tensor == 1:
        raise UserError("parallel.dispatcher: flex needs parallel.expert or expert_tensor above 1; use alltoall")


def _uses_flex(recipe: Recipe) -> bool:
    return bool(recipe.model.num_experts) and recipe.parallel.dispatcher == "flex"


def nearest_multiples(number: int, multiple: int) -> str:
    """The multiples on either side of a number, as the end of a sentence."""
    below = number // multiple * multiple
    found = [n for n in (below, below + multiple) if n > 0]
    return f"the nearest {'are' if len(found) > 1 else 'is'} {' and '.join(map(str, found))}"


def _divides(field: str, divisor: int, number: int, what: str, more: str = "") -> None:
    if number % divisor:
        valid = [n for n in range(1, number + 1) if number % n == 0]
        near = sorted(valid, key=lambda n: (abs(n - divisor), n))[:3]
        raise UserError(
            f"{field}: {divisor} does not divide {what}, {number}; the nearest valid are "
            f"{', '.join(map(str, sorted(near)))}{more}"
        )
