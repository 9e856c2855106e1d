"""One step of a rank as a run makes it, on made-up tokens, and what is counted of it.

The ranks may be real or not (platform/fake_ranks.py), and so may the tensors (shapes_only.py).
"""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import cast
from unittest import mock

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_lpr.data.sampler.replay_sampler import Batch
from megatron_lpr.families import Architecture
from megatron_lpr.model import attention
from megatron_lpr.model.builder import global_counts, init_model_parallel, routers
from megatron_lpr.model.parameters import padded_vocab_size
from megatron_lpr.model.sharding import build_frozen
from megatron_lpr.planning.amounts import RankMemory, Traffic
from megatron_lpr.planning.counted_collectives import CountedCollectives
from megatron_lpr.planning.gathered_weights import GatheredWeights
from megatron_lpr.planning.saved_tensors import SavedTensors
from megatron_lpr.platform.shards import own_part
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.training.optimizer import build_optimizer, update, wrap
from megatron_lpr.training.plan import Plan
from megatron_lpr.training.step import forward_backward

LANGUAGES = 2


def count_step(recipe: Recipe, arch: Architecture) -> tuple[RankMemory, Traffic]:
    """Build this rank's part of the run, make a step without its metrics, and count; the weights are zero."""
    assert recipe.train is not None
    init_model_parallel(recipe.parallel)
    chunks = build_frozen(recipe, arch)
    for chunk in chunks:
        for parameter in chunk.parameters():
            own_part(parameter).detach().zero_()  # what memory happens to hold may be no number
    found, counts = routers(*chunks), global_counts(*chunks)
    counts.num_languages = LANGUAGES
    for router in found:
        router.stats.is_wanted = False
    wrapped = wrap(recipe, chunks)
    optimizer, _ = build_optimizer(recipe, wrapped)
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    parameters = [own_part(parameter) for chunk in wrapped for parameter in chunk.parameters()]
    vocabulary = padded_vocab_size(arch.vocab_size, recipe.parallel.tensor) // recipe.parallel.tensor
    with (
        GatheredWeights() as gathered,
        CountedCollectives(gathered) as collectives,
        mock.patch.object(attention, "causal_lower_right", _plainly_causal),
    ):
        with SavedTensors(parameters, gathered, vocabulary) as saved:
            batches = [_batches(recipe) for _ in wrapped]
            # a step reads of a plan how much it is, and no corpus
            plan = cast(Plan, SimpleNamespace(recipe=recipe, train=recipe.train, data=recipe.data))
            forward_backward(plan, wrapped, batches, counts)
        update(optimizer)
    learns = [parameter for parameter in parameters if parameter.requires_grad]
    memory = RankMemory(
        frozen=bytes_of(parameter for parameter in parameters if not parameter.requires_grad),
        trained=bytes_of(learns),
        gradients=bytes_of(
            buffer.grad_data for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ),
        optimizer=bytes_of(optimizer_tensors(optimizer, learns)),
        activations=saved.peaks["activations"],
        gathered=gathered.peak,
        logits=saved.peaks["logits"],
        working=saved.peaks["working"],
    )
    return memory, dict(collectives.traffic)


def _plainly_causal(queries: int, keys: int) -> None:
    """In place of a mask that is a subclass of Tensor, which torch (2.13) cannot make where operators are watched.

    Without it attention is causal from the first query and key on: other numbers, and the same tensors.
    """


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_tensors(optimizer: MegatronOptimizer, weights: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """fp32 weights that are not the model's own, and moments; a count of steps is no moment."""
    model = {weight.untyped_storage()._cdata for weight in weights}
    for one in optimizer.chained_optimizers:
        if getattr(one, "is_stub_optimizer", False):
            continue
        for group in one.optimizer.param_groups:
            for weight in group["params"]:
                if weight.untyped_storage()._cdata not in model:
                    yield weight
                yield from (x for x in one.optimizer.state[weight].values() if isinstance(x, torch.Tensor) and x.dim())


def _batches(recipe: Recipe) -> Iterator[Batch]:
    """Micro-batches of one token, half of whose sequences are of an original language."""
    assert recipe.train is not None and recipe.data is not None
    length = recipe.data.seq_length // recipe.parallel.context
    shape = (recipe.train.micro_batch_size, length)
    tags = np.ones(shape, dtype=np.int64)
    tags[:, : length // 2] = -2
    ones = np.ones(shape, dtype=np.int64)
    documents = np.zeros((shape[0], recipe.data.seq_length), np.int64) if recipe.data.reset_attention else None
    while True:
        yield Batch(
            tokens_BS=ones, labels_BS=ones, loss_mask_BS=ones.astype(np.float32), tags_BS=tags, documents_BS=documents
        )
