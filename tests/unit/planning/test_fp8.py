"""FP8 in a plan: copies of weights, the rate of the products, and what cannot be (tests/te counts real copies)."""

import dataclasses
import importlib.util
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.model.rank import frozen
from megatron_lpr.model.rank.frozen import frozen_bytes, shards_frozen
from megatron_lpr.planning import search
from megatron_lpr.planning.hardware import GPUS
from megatron_lpr.planning.operations import model_operations
from megatron_lpr.planning.planned import planned
from megatron_lpr.planning.run_plan import plan_run
from megatron_lpr.planning.search import batches
from megatron_lpr.planning.step_time import at_peak
from megatron_lpr.recipe.reading import load_recipe
from megatron_lpr.training.plan_lines import decimal_size, frozen_lines

SPECS = ("te", "local", "auto")
FP8 = ["fp8.recipe=tensorwise", "model.spec=te"]


def recipe_of(*changes):
    return load_recipe("examples/recipes/stage1.yaml", ["model.base=examples/plan/llama-3.2-1b", *changes])


def test_held_in_fp8(root):
    """Frozen linear layers take two bytes a number, or one below the first router, where they took four, or three."""
    recipe = recipe_of("fp8.recipe=tensorwise")
    arch = read_architecture(recipe.model.base)
    held = {}
    for frozen_weights in ("bf16", "fp8"):
        fp8 = dataclasses.replace(recipe.fp8, frozen_weights=frozen_weights)
        held[frozen_weights], _ = planned(dataclasses.replace(recipe, fp8=fp8), arch, 8, 0)
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    of_layer = arch.hidden_size * (2 * queries + 2 * keys + 3 * arch.ffn_hidden_size)  # attention, the frozen expert
    assert held["bf16"].frozen - held["fp8"].frozen == 2 * arch.num_layers * of_layer
    transposed = arch.hidden_size * (queries + 2 * keys)  # queries, keys, values of the first layer
    assert held["bf16"].casts - transposed == held["fp8"].casts > 2 * (arch.num_layers - 1) * of_layer
    of_bf16 = dataclasses.replace(recipe, fp8=dataclasses.replace(recipe.fp8, recipe="none"))
    assert planned(of_bf16, arch, 8, 0)[0].casts == 0


def test_rows_held_in_fp8(root):
    """A byte of each number of a linear layer, divided by the ranks, and as many bytes gathered."""
    recipe = recipe_of("fp8.recipe=tensorwise", "parallel.frozen=sharded")
    arch, found = read_architecture(recipe.model.base), {}
    for frozen_weights in ("bf16", "fp8"):
        fp8 = dataclasses.replace(recipe.fp8, frozen_weights=frozen_weights)
        found[frozen_weights] = planned(dataclasses.replace(recipe, fp8=fp8), arch, 8, 0)
    (bf16, plain), (fp8, bytewise) = found["bf16"], found["fp8"]
    rows = fp8.casts - bf16.casts - 4 * 4 * arch.num_layers  # four weights of a layer, each with its scale
    assert bf16.frozen - fp8.frozen == 2 * rows and bf16.gathered > fp8.gathered > bf16.gathered / 2
    moved, fewer = plain["all_gather", "frozen"], bytewise["all_gather", "frozen"]
    batches = recipe.train.global_batch_size // recipe.train.micro_batch_size // 8
    backward = (arch.num_layers - 1) * rows // arch.num_layers
    assert moved.calls == fewer.calls and moved.bytes - fewer.bytes == batches * (rows + backward)


@pytest.mark.parametrize(
    "numbers, layout", [("tensorwise", "replicated"), ("tensorwise", "sharded"), ("blockwise", "replicated")]
)
def test_training_counts_frozen_weights_as_the_plan_does(root, numbers, layout):
    """In a review, where no weight of a linear layer learns."""
    fp8 = [f"fp8.recipe={numbers}", "fp8.frozen_weights=fp8"]
    recipe = recipe_of(*fp8, "train.trainable=routers", f"parallel.frozen={layout}")
    arch = read_architecture(recipe.model.base)
    memory, _ = planned(recipe, arch, 8, 0)
    held = memory.frozen + memory.casts
    assert frozen_bytes(recipe, arch, 8, sharded=layout == "sharded") == held
    (line,) = frozen_lines(recipe, arch, 8)
    assert line.startswith(f"frozen       {layout}: {decimal_size(held)} on a rank")


def test_what_is_held_in_fp8_is_sharded_by_its_own_bytes(root, monkeypatch):
    """`parallel.frozen: auto`: two bytes of a number, one in the first layer, and scales; not bfloat16's."""
    kinds = [("tensorwise", "bf16"), ("tensorwise", "fp8"), ("blockwise", "fp8")]
    bf16, tensorwise, blockwise = (recipe_of(f"fp8.recipe={n}", f"fp8.frozen_weights={held}") for n, held in kinds)
    arch = read_architecture(bf16.model.base)
    held = [frozen_bytes(recipe, arch, 8) for recipe in (bf16, tensorwise, blockwise)]
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    first = arch.hidden_size * (2 * queries + 2 * keys + 3 * arch.ffn_hidden_size)  # attention, the frozen expert
    assert held[0] - held[1] == first - 4 * 4 * arch.num_layers  # four weights of a layer, each with its scale
    assert held[1] < held[2] < held[0]  # 128 x 128 numbers share a scale
    for recipe, most in ((tensorwise, held[1]), (blockwise, held[2])):
        monkeypatch.setattr(frozen, "SHARDED_ABOVE", most)
        assert shards_frozen(bf16, arch, 8) and not shards_frozen(recipe, arch, 8)
        monkeypatch.setattr(frozen, "SHARDED_ABOVE", most - 1)
        assert shards_frozen(recipe, arch, 8)


@pytest.mark.parametrize("numbers, can_shard", [("tensorwise", True), ("blockwise", False)])
def test_layouts_that_shard_what_is_held_in_fp8(root, numbers, can_shard):
    recipe = recipe_of(f"fp8.recipe={numbers}", "fp8.frozen_weights=fp8")
    sizes = search._sizes(recipe, read_architecture(recipe.model.base), 8, GPUS["h100"])
    assert {one.frozen for one in sizes} == ({"replicated", "sharded"} if can_shard else {"replicated"})


def test_rate_of_the_products(root):
    plain, all_layers, fewer = (
        recipe_of(*changes) for changes in ([], FP8[:1], [*FP8[:1], "fp8.bf16_layers_at_end=4"])
    )
    arch, h100 = read_architecture(plain.model.base), GPUS["h100"]
    works = [model_operations(recipe, arch) for recipe in (plain, all_layers, fewer)]
    assert len({work.total for work in works}) == 1 and works[0].in_fp8 == 0
    assert 0 < works[2].in_fp8 < works[1].in_fp8
    head = 2 * 2 * 512 * 1024 * 128256 * arch.hidden_size  # forward, gradient of the input
    router = 3 * 2 * 512 * 1024 * plain.model.num_experts * arch.hidden_size * arch.num_layers
    router -= 2 * 512 * 1024 * plain.model.num_experts * arch.hidden_size  # nothing below the first one learns
    assert works[1].products - works[1].in_fp8 == head + router
    seconds = [at_peak(work, h100, "bfloat16") for work in works]
    assert seconds[0] > seconds[2] > seconds[1] > seconds[0] / 2


def test_gpus_without_fp8(root):
    with pytest.raises(UserError, match="--gpu a100: does not compute in FP8"):
        plan_run(recipe_of(*FP8), 8, "a100")


@pytest.mark.parametrize("installed", [False, True])
def test_a_plan_needs_no_gpu(root, monkeypatch, installed):
    """`te` is planned as it is, whatever this machine has; `auto` as what is installed here."""
    loader = SimpleNamespace()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, loader) if installed else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    held = {spec: plan_run(recipe_of(f"model.spec={spec}"), 8, "h100", most=1).own.memory for spec in SPECS}
    assert held["te"] != held["local"] and held["auto"] == held["te" if installed else "local"]


def test_a_plan_needs_no_transformer_engine(root):
    auto = "model.dtype=auto"  # each GPU that is known is fast in bfloat16
    plan = plan_run(recipe_of(*FP8, "fp8.frozen_weights=fp8", auto), 8, "h100", most=3)
    assert plan.found.best and all(layout.sizes.frozen == "replicated" for layout in plan.found.best)


@pytest.mark.parametrize("changes, smallest", [([], 1), (FP8, 2)])
def test_layouts_whose_tokens_no_product_takes_are_left_out(root, changes, smallest):
    recipe = recipe_of(*changes, "data.seq_length=1008", "parallel.tensor=2")  # 504 tokens of a sample on a rank
    arch = read_architecture(recipe.model.base)
    assert min(train.micro_batch_size for train in batches(recipe, arch, 8)) == smallest
