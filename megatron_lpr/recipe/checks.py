"""Everything about a recipe that can be wrong before any process group, GPU or file is taken."""

import importlib.util

import torch

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.families.expansion import Expansion, check_upcycling
from megatron_lpr.recipe.settings import ModelConfig, ParallelConfig, Recipe


def check_recipe(recipe: Recipe, arch: Architecture, world_size: int) -> None:
    """Check sizes against each other, the model and the number of ranks.

    Raises:
        UserError: names the field, the value and the nearest valid ones.
    """
    _check_experts(recipe)
    check_upcycling(arch, expansion_of(recipe.model))
    _check_sizes(recipe, arch, world_size)
    _check_dispatcher(recipe)
    _check_overlap(recipe.parallel)
    if recipe.train is not None:
        _check_training(recipe, arch, world_size)


def expansion_of(model: ModelConfig) -> Expansion:
    """The expansion that a recipe asks for."""
    return Expansion(
        num_experts=model.num_experts,
        num_frozen=model.num_frozen_experts,
        topk=model.topk,
        mlp_only_layers=model.mlp_only_layers,
        router_std=model.router_init_std,
        router_seed=model.router_init_seed,
    )


def _check_experts(recipe: Recipe) -> None:
    model, sizes = recipe.model, recipe.parallel
    if not model.num_experts:
        for field, value, neutral in (
            ("model.mlp_only_layers", model.mlp_only_layers, ()),
            ("parallel.expert", sizes.expert, 1),
            ("parallel.expert_tensor", sizes.expert_tensor, 1),
            ("balance.coeff", recipe.balance.coeff, 0),
            ("lpr.coeff", recipe.lpr.coeff, 0),
        ):
            if value != neutral:
                raise UserError(f"{field}: {value} has no effect on a dense model (model.num_experts: 0)")
        return
    if model.num_frozen_experts < 1:
        raise UserError("model.num_frozen_experts: at least 1, the original FFN")
    new = model.num_experts - model.num_frozen_experts
    if new < 1:
        raise UserError(
            f"model.num_experts: {model.num_experts} leaves no new expert beside {model.num_frozen_experts} frozen: "
            f"at least {model.num_frozen_experts + 1}"
        )
    if not 1 <= model.topk <= model.num_experts:
        raise UserError(f"model.topk: {model.topk} of {model.num_experts} experts; choose 1 to {model.num_experts}")
    _divides("parallel.expert", sizes.expert, new, "the number of new experts (model.num_experts minus frozen ones)")


def _check_sizes(recipe: Recipe, arch: Architecture, world_size: int) -> None:
    sizes = recipe.parallel
    for field in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor"):
        if getattr(sizes, field) < 1:
            raise UserError(f"parallel.{field}: {getattr(sizes, field)}; at least 1")
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
    _divides("parallel.tensor x context x pipeline", ranks, world_size, "the number of ranks")
    experts = sizes.expert_tensor * sizes.expert * sizes.pipeline
    _divides("parallel.expert_tensor x expert x pipeline", experts, world_size, "the number of ranks")


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
        if layers < 1 or layers % chunks:
            multiple = f"a multiple of parallel.virtual_pipeline ({chunks})" if chunks > 1 else "at least 1"
            raise UserError(f"{field}: {layers}; {multiple}")
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
    for layers in _layers_of_chunks(sizes, arch.num_layers):
        if not set(layers) & set(arch.moe_layers()):
            raise UserError(
                f"model.mlp_only_layers: {list(arch.mlp_only_layers)} leave nothing to learn in the pipeline stage of "
                f"layers {layers[0]} to {layers[-1]}; use fewer stages or another split (parallel.first_stage_layers)"
            )


def _layers_of_chunks(sizes: ParallelConfig, num_layers: int) -> list[range]:
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


def _check_dispatcher(recipe: Recipe) -> None:
    sizes = recipe.parallel
    if not recipe.model.num_experts or sizes.dispatcher != "flex":
        return
    if not torch.cuda.is_available():
        raise UserError("parallel.dispatcher: flex needs CUDA (it runs on DeepEP); use alltoall or allgather")
    if sizes.expert * sizes.expert_tensor == 1:
        raise UserError("parallel.dispatcher: flex needs parallel.expert or expert_tensor above 1; use alltoall")


def _check_training(recipe: Recipe, arch: Architecture, world_size: int) -> None:
    train, sizes = recipe.train, recipe.parallel
    if recipe.data is None:
        raise UserError("data: missing; training needs data.manifest")
    for field in ("steps", "global_batch_size", "micro_batch_size"):
        if getattr(train, field) < 1:
            raise UserError(f"train.{field}: {getattr(train, field)}; at least 1")
    if not 0 <= recipe.optimizer.warmup_steps < train.steps:
        raise UserError(
            f"optimizer.warmup_steps: {recipe.optimizer.warmup_steps} of train.steps: {train.steps}; "
            f"choose 0 to {train.steps - 1}"
        )
    for field in ("router_every", "router_layers_every"):
        if getattr(recipe.logging, field) < 1:
            raise UserError(f"logging.{field}: {getattr(recipe.logging, field)}; at least 1 (a large number is never)")
    if train.trainable != "all" and not recipe.model.num_experts:
        raise UserError(f"train.trainable: {train.trainable} needs experts; set model.num_experts, or trainable: all")
    for field in ("every", "keep"):
        if getattr(recipe.checkpoint, field) < 0:
            raise UserError(f"checkpoint.{field}: {getattr(recipe.checkpoint, field)}; at least 0")
    _check_data(recipe)
    mixtures = [recipe.data.mixture, *(piece.mixture or {} for piece in recipe.data.schedule)]
    if recipe.lpr.coeff and not any(mixture.get("original") for mixture in mixtures):
        raise UserError(
            f"lpr.coeff: {recipe.lpr.coeff} without original-language data; the review needs a share of it, as "
            "data.mixture: {expanded: 0.5, original: 0.5}, and a corpus with role original in the manifest"
        )
    _check_seq_length(recipe.data.seq_length, sizes, arch)
    data_parallel = world_size // (sizes.tensor * sizes.context * sizes.pipeline)
    samples = train.micro_batch_size * data_parallel
    if train.global_batch_size % samples:
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of micro_batch_size x data-parallel "
            f"size = {train.micro_batch_size} x {data_parallel}; {_nearest(train.global_batch_size, samples)}"
        )
    if sizes.virtual_pipeline > 1 and (train.global_batch_size // samples) % sizes.pipeline:
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of micro_batch_size x data-parallel "
            f"size x pipeline = {train.micro_batch_size} x {data_parallel} x {sizes.pipeline}, as "
            f"parallel.virtual_pipeline needs; {_nearest(train.global_batch_size, samples * sizes.pipeline)}"
        )


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    if data.read_ahead < 0:
        raise UserError(f"data.read_ahead: {data.read_ahead}; at least 0")
    if not data.reset_attention:
        return
    if data.windows == "document":
        raise UserError("data.reset_attention: true has no effect on samples of one document (data.windows: document)")
    if recipe.model.spec != "local" and importlib.util.find_spec("transformer_engine") is not None:
        raise UserError(
            "data.reset_attention: true is not written for Transformer Engine's attention; set model.spec: local, or "
            "data.windows: document"
        )


def _check_seq_length(seq_length: int, sizes: ParallelConfig, arch: Architecture) -> None:
    # a context-parallel rank has two chunks of the sequence
    parts, of = sizes.tensor, f"parallel.tensor ({sizes.tensor})"
    if sizes.context > 1:
        parts, of = 2 * sizes.context * parts, f"2 x parallel.context ({sizes.context}) x {of}"
    if seq_length < 1 or seq_length % parts:
        raise UserError(f"data.seq_length: {seq_length} is no multiple of {of}; {_nearest(seq_length, parts)}")
    positions = arch.max_position_embeddings
    if seq_length > positions:
        raise UserError(
            f"data.seq_length: {seq_length}, but the model has {positions} positions (max_position_embeddings of its "
            f"config.json); choose {positions // parts * parts} at most"
        )


def _nearest(number: int, multiple: int) -> str:
    """The multiples on either side of a number, as the end of a sentence."""
    below = number // multiple * multiple
    found = [n for n in (below, below + multiple) if n > 0]
    return f"the nearest {'are' if len(found) > 1 else 'is'} {' and '.join(map(str, found))}"


def _divides(field: str, divisor: int, number: int, what: str) -> None:
    if number % divisor:
        valid = [n for n in range(1, number + 1) if number % n == 0]
        near = sorted(valid, key=lambda n: (abs(n - divisor), n))[:3]
        raise UserError(
            f"{field}: {divisor} does not divide {what}, {number}; the nearest valid are "
            f"{', '.join(map(str, sorted(near)))}"
        )
