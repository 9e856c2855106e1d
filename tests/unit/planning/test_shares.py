"""What the ranks of a layout hold adds up to the model."""

import dataclasses

import pytest

from megatron_lpr.families import read_architecture
from megatron_lpr.model.parameters import padded_vocab_size, parameter_sizes
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.parameters import parameters
from megatron_lpr.model.rank.place import Place
from megatron_lpr.planning.buffers import buckets
from megatron_lpr.planning.operations import model_operations, operations
from megatron_lpr.planning.planned import planned
from megatron_lpr.recipe.reading import load_recipe
from megatron_lpr.training.cost import model_size


def planned_recipe(base, *changes):
    return load_recipe("examples/recipes/stage1.yaml", [f"model.base=examples/plan/{base}", *changes])


LAYOUTS = {
    "pipeline": ("qwen3-8b", 16, ["parallel.pipeline=2"]),
    "uneven": ("qwen3-8b", 32, ["parallel.pipeline=4", "parallel.first_stage_layers=6"]),
    "interleaved": ("llama-3.1-70b", 256, ["parallel.pipeline=4", "parallel.virtual_pipeline=5", "parallel.tensor=8"]),
    "tied": ("llama-3.2-1b", 8, []),
}


@pytest.mark.parametrize(
    "base, published",
    {
        "llama-3.2-1b": 1_235_814_400,
        "qwen3-8b": 8_190_735_360,
        "qwen2.5-32b": 32_763_876_352,
        "llama-3.1-70b": 70_553_706_496,
    }.items(),
)
def test_the_examples_have_the_parameters_that_are_published(base, published, root):
    arch = read_architecture(f"examples/plan/{base}")
    sizes = parameter_sizes(arch, num_experts=0, num_frozen=0, vocab_size=arch.vocab_size)
    assert sum(size for _, size in sizes) == published


@pytest.mark.parametrize("base, world_size, changes", LAYOUTS.values(), ids=list(LAYOUTS))
def test_parameters_add_up(base, world_size, changes, root):
    recipe = planned_recipe(base, *changes, "train.micro_batch_size=1", "parallel.frozen=replicated")
    arch = read_architecture(recipe.model.base)
    size = model_size(recipe, arch)
    total = {True: 0.0, False: 0.0}
    for rank in range(world_size):
        place = Place(recipe.parallel, world_size, rank)
        for parameter in (p for chunk in parameters(recipe, arch, place) for p in chunk):
            copies = place.size(parameter.copies)
            # norms and routers are whole on the tensor-parallel ranks too
            if parameter.whole and parameter.copies == "data":
                copies *= recipe.parallel.tensor
            total[parameter.learns] += parameter.elements / copies
    assert total == pytest.approx({True: size.trainable, False: size.frozen}, rel=1e-12)


def test_shards_of_the_optimizer_add_up(root):
    recipe = planned_recipe("qwen3-8b", "parallel.overlap_grad_reduce=true")
    arch, world_size = read_architecture(recipe.model.base), 16
    updated = 0
    for rank in range(world_size):
        place = Place(recipe.parallel, world_size, rank)
        found = buckets(parameters(recipe, arch, place), place, recipe.model.dtype)
        updated += sum(b.shard(place.index(b.group), place.size(b.group)) for b in found)
        assert all(bucket.elements % (128 * place.size(bucket.group) // 2) == 0 for bucket in found)
    assert len(found) > 2, "with overlap there are many buckets"
    assert updated == model_size(recipe, arch).trainable


def test_sharded_frozen_weights_are_there_once(root):
    recipe = planned_recipe("qwen2.5-32b")
    arch = read_architecture(recipe.model.base)

    def frozen(mode, ranks):
        sizes = dataclasses.replace(recipe.parallel, frozen=mode)
        return planned(dataclasses.replace(recipe, parallel=sizes), arch, ranks, 0)[0]

    assert frozen("sharded", 64).frozen == pytest.approx(frozen("replicated", 64).frozen / 64, rel=0.01)
    assert frozen("sharded", 64).gathered and not frozen("replicated", 64).gathered
    assert frozen("auto", 64) == frozen("sharded", 64), "more than 16 GiB"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_is_computed_twice_of_a_dense_model(recompute, root):
    changes = ["model.num_experts=0", "train.trainable=all", "balance.coeff=0", f"train.recompute={recompute}"]
    recipe = planned_recipe("llama-3.2-1b", *changes)
    arch, train = read_architecture(recipe.model.base), recipe.train
    work = operations(recipe, arch, Layers(recipe, arch, Place(recipe.parallel, 1, 0), train), recompute)
    of_a_number = 2 * train.global_batch_size * recipe.data.seq_length * arch.hidden_size
    logits = of_a_number * padded_vocab_size(arch.vocab_size, 1)  # of a micro-batch they are more than one chunk
    ffn = of_a_number * 3 * arch.ffn_hidden_size
    attention = of_a_number * 2 * (arch.num_attention_heads + arch.num_query_groups) * arch.head_dim
    of_layers = {"none": 0, "selective": ffn, "full": ffn + attention + work.scores // (3 * arch.num_layers)}
    assert work.again == logits + arch.num_layers * of_layers[recompute]


@pytest.mark.parametrize("window", [None, 1000, 128])
def test_scores_are_of_the_positions_that_a_query_sees(window, root):
    recipe = planned_recipe("llama-3.2-1b", "train.trainable=routers", "data.seq_length=4096")
    arch = dataclasses.replace(read_architecture(recipe.model.base), sliding_window=window)
    seen = sum(min(position + 1, window or 4096) for position in range(4096))
    query = arch.num_attention_heads * arch.head_dim
    forward = 2 * 2 * recipe.train.global_batch_size * seen * query
    layers = 1 + 3 * (arch.num_layers - 1)  # below the first nothing learns
    assert model_operations(recipe, arch).scores == pytest.approx(layers * forward, rel=1e-2)
