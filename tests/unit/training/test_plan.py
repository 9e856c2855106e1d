"""What a plan says of a run: its settings, where it starts, how large it is, what it reads; and the replay budget."""

import dataclasses

import pytest
import yaml
from fake_checkpoints import write_fake_checkpoint
from harness import FixedSampler, make_plan, make_recipe, mixed_batch
from safetensors.torch import load_file, save_file

from megatron_lpr import cli
from megatron_lpr.checkpoint.run_state import RunState
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.errors import UserError
from megatron_lpr.model.rank.frozen import frozen_bytes
from megatron_lpr.recipe.reading import from_tree, load_recipe
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.testing.toy_models import write_toy_project
from megatron_lpr.training.cost import model_size
from megatron_lpr.training.plan import describe, plan_training
from megatron_lpr.training.plan_lines import decimal_size, frozen_lines, long_log
from megatron_lpr.training.replay_budget import ReplayBudget, replay_budget


@pytest.fixture
def recipe(toy_base, tmp_path):
    return make_recipe(toy_base, mixed_batch(), tmp_path, {"train": {"steps": 3}})


@pytest.fixture
def plan(recipe):
    # the real sampler knows any number of samples, the fixed one those of a batch
    plan = make_plan(recipe, mixed_batch())
    plan.sampler.batch = type(plan.sampler.batch)(
        **{name: array.repeat(3, 0) for name, array in vars(plan.sampler.batch).items() if array is not None}
    )
    return plan


def test_description_is_what_differs_from_the_defaults_and_what_it_comes_to(plan, recipe):
    settings, _, summary = describe(plan).partition("\n\n")
    assert yaml.safe_load(settings) == {
        "name": "test",
        "output": recipe.output,
        "model": {"base": recipe.model.base, "num_experts": 4},
        "data": {"manifest": "none", "seq_length": 16},
        "train": {"trainable": "all", "steps": 3, "global_batch_size": 4, "micro_batch_size": 4},
        "optimizer": {"clip_grad": 1e9},
    }
    assert from_tree(Recipe, yaml.safe_load(settings), where="printed") == recipe
    assert f"every setting goes to {recipe.output}/recipe.yaml" in settings
    assert f"base model {recipe.model.base}" in summary and "trains       all on 1 rank(s)" in summary
    assert "12 samples, 132 tokens in 3 steps: qaa 63, qab 21, qac 48" in summary


def test_description_names_the_checkpoint_it_starts_from(plan, tmp_path):
    source = write_fake_checkpoint(tmp_path, 3)
    assert f"checkpoint {source}" in describe(dataclasses.replace(plan, source=source))
    state = RunState(step=2, consumed_samples=8, has_optimizer=True, recipe={}, base={})
    resumed = dataclasses.replace(plan, resume=tmp_path, state=state)
    assert "step 2 of this run" in describe(resumed) and resumed.first_step == 2


def test_a_log_that_fills_disks_is_told_before(recipe, plan):
    """200 languages, 80 layers and 256 experts: 90 MB in each record of every layer."""
    arch = dataclasses.replace(plan.arch, num_layers=80)
    large = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, num_experts=256),
        train=dataclasses.replace(recipe.train, steps=50_000),
    )
    [sentence] = long_log(large, arch, 200)
    assert "some 49.1 GB, 90.8 MB of them with each record of every layer: raise logging.router_layers" in sentence
    seldom = dataclasses.replace(large.logging, router_layers_every=10_000, router_every=10)
    assert not list(long_log(dataclasses.replace(large, logging=seldom), arch, 200))
    assert not list(long_log(recipe, plan.arch, 3)) and "metrics.jsonl will" not in describe(plan)


@pytest.mark.parametrize("local_rank", [0, 3])
def test_one_process_of_a_node_compares_the_files_of_corpora(tmp_path, monkeypatch, local_rank):
    recipes = write_toy_project(tmp_path)
    assert cli.main(["preprocess", str(recipes["upcycle"])]) == 0
    seen = []
    monkeypatch.setattr(Manifest, "check_files", lambda self, corpus: seen.append(corpus.name))
    for name, value in (("RANK", local_rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    plan = plan_training(load_recipe(str(recipes["stage1"]), ["train.micro_batch_size=1", "model.load=null"]))
    assert seen == ([corpus.name for corpus in plan.manifest.corpora] if local_rank == 0 else [])


def test_languages_of_the_plan(plan):
    assert plan.is_original == [False, True, True]


def test_description_of_a_finished_run(plan, tmp_path):
    state = RunState(step=3, consumed_samples=12, has_optimizer=True, recipe={}, base={})
    done = dataclasses.replace(plan, resume=tmp_path, state=state)
    assert done.finished and not plan.finished
    assert describe(done).startswith("nothing to do: the run in ") and "\n" not in describe(done)
    noted = dataclasses.replace(done, notes=("latest is missing: takes step_00000003",))
    assert describe(noted) == f"{describe(done)}\nwarning      latest is missing: takes step_00000003"


def test_description_says_how_large_the_model_is(plan, recipe):
    size = model_size(recipe, plan.arch)
    text = describe(plan)
    assert f"parameters   {size.trainable:,}: {size.trainable:,} trainable, 0 frozen" in text
    weights, all_of_it = decimal_size(size.weight_bytes["whole"]), decimal_size(size.checkpoint_bytes("whole"))
    assert f"checkpoint   {weights}, {all_of_it} with the optimizer's state: every weight" in text


def test_description_says_where_frozen_weights_lie(recipe, plan):
    train = dataclasses.replace(recipe.train, trainable="routers")
    model = dataclasses.replace(recipe.model, num_experts=5)
    whole = dataclasses.replace(recipe, train=train, model=model)
    sharded = dataclasses.replace(whole, parallel=dataclasses.replace(whole.parallel, frozen="sharded"))
    held, own = (frozen_bytes(whole, plan.arch, 4, sharded=spread) for spread in (False, True))
    assert list(frozen_lines(recipe, plan.arch, 4)) == []
    assert list(frozen_lines(whole, plan.arch, 4)) == [f"frozen       replicated: {decimal_size(held)} on a rank"]
    (line,) = frozen_lines(sharded, plan.arch, 4)
    assert line == f"frozen       sharded: {decimal_size(own)} on a rank, where a copy is {decimal_size(held)}"
    assert held // 4 <= own < held // 2  # norms and routers are not spread


@pytest.fixture
def budget_of(recipe):
    """mixed_batch() has 44 tokens, 23 of them original; a run reads it in every one of its ten steps."""

    def make(stage1=None, **replay) -> ReplayBudget | None:
        batch = mixed_batch()
        batch = dataclasses.replace(
            batch, **{name: array.repeat(10, 0) for name, array in vars(batch).items() if array is not None}
        )
        train, data = dataclasses.replace(recipe.train, steps=10), recipe.data
        data = dataclasses.replace(data, replay=dataclasses.replace(data.replay, **replay))
        return replay_budget(train, data, FixedSampler(batch), stage1)

    return make


def test_replay_is_counted_over_the_whole_run_against_stage_1(budget_of):
    budget = budget_of(46_000)
    assert (budget.replayed, budget.stage1) == (230, 46_000)
    budget.check()
    assert str(budget) == "230 tokens of original languages, 0.50% of stage 1's 46,000 (limit 1.00%)"


def test_replay_above_the_limit_is_refused_unless_allowed(budget_of):
    with pytest.raises(UserError, match="reads 230 tokens of original languages, 1.00% of stage 1's 22,999, above"):
        budget_of(22_999).check()
    budget_of(22_999, max_share=0.02).check()
    budget_of(22_999, stage1_tokens=23_000).check()
    with pytest.raises(UserError, match="data.replay.max_share"):
        budget_of(None, stage1_tokens=100).check()


def test_replay_without_a_stage_1_has_no_limit(budget_of):
    budget = budget_of()
    budget.check()
    assert "stage 1 not known" in str(budget)


def test_what_would_stop_a_fresh_run_stops_its_plan(tmp_path):
    path = str(write_toy_project(tmp_path)["stage1"])
    assert cli.main(["preprocess", path]) == 0
    fresh = ["model.load=null"]
    assert plan_training(load_recipe(path, fresh), 2).source is None
    chosen = plan_training(load_recipe(path, [*fresh, "model.dtype=auto"]))
    assert chosen.recipe.model.dtype in ("float32", "bfloat16")
    assert f"dtype        {chosen.recipe.model.dtype} (model.dtype: auto), the " in str(chosen)
    (tmp_path / "file").touch()
    for output, expected in (("file/out", "cannot be made: .*file' is a file"), ("base/out", "lies in .*base'")):
        with pytest.raises(UserError, match=f"output folder .*{expected}"):
            plan_training(load_recipe(path, [*fresh, f"output={tmp_path}/{output}"]), 2)
    weights = tmp_path / "base/model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight"):
        plan_training(load_recipe(path, fresh), 2)
