"""Everything that check_recipe refuses, and what it lets pass."""

import dataclasses

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.checks import check_preprocessing, check_recipe
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe


@pytest.fixture(scope="module")
def arch(tmp_path_factory):
    """2 layers, 4 heads, 2 key/value heads, FFN width 48."""
    from megatron_lpr.testing.toy_models import write_toy_model

    return read_architecture(write_toy_model(tmp_path_factory.mktemp("validation") / "base"))


def recipe(**sections):
    tree = {
        "model": {"base": "b", "num_experts": 5},
        "data": {"manifest": "m", "seq_length": 32, "mixture": {"expanded": 0.5, "original": 0.5}},
        "train": {"trainable": "routers", "steps": 4, "global_batch_size": 8, "micro_batch_size": 2},
    }
    for name, section in sections.items():
        tree[name] = section if section is None else tree.get(name, {}) | section
    return from_tree(Recipe, {"name": "x", "output": "o", **tree}, where="test")


@pytest.mark.parametrize(
    "world_size, sections",
    [
        (1, {}),
        (1, {"lpr": {"coeff": 0.1}}),
        (1, {"train": None, "data": None}),
        (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
        (4, {"parallel": {"expert": 4}}),
        (2, {"parallel": {"expert_tensor": 2}}),
        (8, {"parallel": {"context": 4, "tensor": 2}}),
        (4, {"parallel": {"context": 4, "expert": 4}, "train": {"micro_batch_size": 8}}),
        (1, {"model": {"num_experts": 0}, "train": {"trainable": "all"}}),
        (1, {"model": {"num_frozen_experts": 4, "topk": 5}}),
        (2, {"parallel": {"dispatcher": "flex", "expert_tensor": 2}}),
    ],
)
def test_valid(arch, world_size, sections):
    check_recipe(recipe(**sections), arch, world_size)


def test_settings_that_were_not_read_are_checked_too(arch):
    checked = recipe()
    checked = dataclasses.replace(checked, optimizer=dataclasses.replace(checked.optimizer, beta1=1.5))
    with pytest.raises(UserError, match=r"^optimizer.beta1: 1.5; at least 0, below 1$"):
        check_recipe(checked, arch, 1)


@pytest.mark.parametrize(
    "settings, base, expected",
    [
        ({"corpora": []}, "b", "preprocess.corpora: empty; name at least one"),
        ({"output": None}, "b", "preprocess.output: missing"),
        ({"tokenizer": None}, "", "preprocess.tokenizer: missing"),
        ({"tokenizer": None}, "nowhere", "model.base: nowhere: no such folder"),
        ({}, "nowhere", None),
    ],
)
def test_what_preprocessing_needs(settings, base, expected):
    corpus = {"name": "x", "files": "a.jsonl", "language": "hu", "role": "expanded"}
    section = {"corpora": [corpus], "output": "o", "tokenizer": "t"} | settings
    checked = recipe(preprocess=section, model={"base": base})
    if expected is None:
        return check_preprocessing(checked)
    with pytest.raises(UserError, match=expected):
        check_preprocessing(checked)


def test_a_later_mixture_may_bring_the_original_languages(arch):
    data = {"mixture": {"expanded": 1.0}, "schedule": [{"from_sample": 8, "mixture": {"original": 1.0}}]}
    check_recipe(recipe(data=data, lpr={"coeff": 0.1}), arch, 1)


@pytest.mark.parametrize(
    "world_size, sections, expected",
    [
        (1, {"data": {"read_ahead": -1}}, "data.read_ahead: -1; at least 0"),
        (1, {"train": {"max_skipped_steps": 3}}, "3 has no effect with train.on_not_finite: stop"),
        (1, {"optimizer": {"schedule": "constant", "min_lr": 1e-5}}, "min_lr: 1e-05 has no effect with optimizer.sch"),
        (1, {"data": {"reset_attention": True, "windows": "document"}}, "no effect on samples of one document"),
        (1, {"model": {"num_frozen_experts": 0}}, "model.num_frozen_experts: 0; at least 1"),
        (1, {"model": {"num_frozen_experts": 5}}, "leaves no new expert beside 5 frozen: at least 6"),
        (1, {"model": {"topk": 6}}, "model.topk: 6 of 5 experts; choose 1 to 5"),
        (1, {"model": {"topk": 0}}, "model.topk: 0; at least 1"),
        (3, {"parallel": {"expert": 3}}, "parallel.expert: 3 does not divide the number of new experts"),
        (3, {"parallel": {"expert": 3}}, "nearest valid are 1, 2, 4"),
        (3, {"parallel": {"tensor": 3}}, "parallel.tensor: 3 does not divide the number of attention heads, 4"),
        (4, {"parallel": {"tensor": 4}}, "number of key/value heads, 2"),
        (5, {"parallel": {"expert_tensor": 5}}, "parallel.expert_tensor: 5 does not divide the FFN width, 48"),
        (3, {"parallel": {"pipeline": 3}}, "number of layers, 2"),
        (1, {"parallel": {"tensor": 2}}, "of ranks, 1; the nearest valid are 1; torchrun or srun starts several"),
        (6, {"parallel": {"expert": 4}}, "does not divide the number of ranks, 6"),
        (1, {"parallel": {"virtual_pipeline": 2}}, "parallel.virtual_pipeline: 2 needs parallel.pipeline above 1"),
        (1, {"parallel": {"tensor": 0}}, "parallel.tensor: 0; at least 1"),
        (0, {}, "the number of ranks: 0; at least 1"),
        (
            128,
            {"parallel": {"context": 128}, "data": {"seq_length": 256}},
            "128 positions (max_position_embeddings of its config.json); use smaller",
        ),
        (1, {"model": {"num_experts": 0}}, "train.trainable: routers needs experts"),
        (1, {"model": {"num_experts": 0}, "lpr": {"coeff": 0.1}}, "lpr.coeff: 0.1 has no effect on a dense model"),
        (1, {"model": {"num_experts": 0}, "balance": {"coeff": 0.1}}, "balance.coeff: 0.1 has no effect"),
        (1, {"model": {"num_experts": 0}, "optimizer": {"router_lr": 0.1}}, "optimizer.router_lr: 0.1 has no effect"),
        (1, {"train": {"trainable": "routers"}, "optimizer": {"router_lr": 0.1}}, "set optimizer.lr alone"),
        (1, {"model": {"topk": 1}, "train": {"trainable": "routers"}}, "model.topk: 1 gives a token's only expert the"),
        (2, {"model": {"num_experts": 0}, "parallel": {"expert": 2}}, "parallel.expert: 2 has no effect"),
        (1, {"model": {"num_experts": 0, "mlp_only_layers": [1]}}, "model.mlp_only_layers: (1,) has no effect"),
        (1, {"data": None}, "data: missing"),
        (1, {"checkpoint": {"keep": -1}}, "checkpoint.keep: -1; at least 0"),
        (1, {"checkpoint": {"every": -5}}, "checkpoint.every: -5; at least 0"),
        (1, {"train": {"steps": 0}}, "train.steps: 0; at least 1"),
        (1, {"train": {"micro_batch_size": 0}}, "train.micro_batch_size: 0; at least 1"),
        (1, {"logging": {"router_every": 0}}, "logging.router_every: 0; at least 1"),
        (1, {"logging": {"router_every": -3}}, "logging.router_every: -3; at least 1"),
        (1, {"logging": {"router_layers_every": 0}}, "logging.router_layers_every: 0; at least 1"),
        (1, {"train": {"micro_batch_size": 3}}, "no multiple of micro_batch_size x data-parallel size = 3 x 1"),
        (1, {"train": {"micro_batch_size": 3}}, "the nearest are 6 and 9"),
        (3, {}, "= 2 x 3; the nearest are 6 and 12"),
        (1, {"lpr": {"coeff": 0.1}, "data": {"mixture": {"expanded": 1}}}, "0.1 without original-language data"),
        (2, {"parallel": {"tensor": 2}, "data": {"seq_length": 31}}, "data.seq_length: 31 is no multiple of"),
        (2, {"parallel": {"tensor": 2}, "data": {"seq_length": 31}}, "parallel.tensor (2); the nearest are 30 and 32"),
        (2, {"parallel": {"context": 2}, "data": {"seq_length": 34}}, "2 x parallel.context (2) x parallel.tensor (1)"),
        (8, {"parallel": {"context": 4, "tensor": 2}, "data": {"seq_length": 24}}, "the nearest are 16 and 32"),
        (8, {"parallel": {"context": 4, "tensor": 2}, "data": {"seq_length": 8}}, "the nearest is 16"),
        (3, {"parallel": {"context": 2}}, "parallel.tensor x context x pipeline: 2 does not divide"),
        (2, {"parallel": {"context": 2}, "train": {"micro_batch_size": 3}}, "data-parallel size = 3 x 1"),
        (1, {"data": {"seq_length": 0}}, "data.seq_length: 0; at least 1, at most 2^31"),
        (1, {"data": {"seq_length": 129}}, "data.seq_length: 129, but the model has 128 positions"),
        (2, {"parallel": {"context": 2}, "data": {"seq_length": 132}}, "of its config.json); choose 128 at most"),
        (1, {"parallel": {"first_stage_layers": 1}}, "first_stage_layers: 1 needs parallel.pipeline above 1"),
        (1, {"parallel": {"last_stage_layers": 1}}, "last_stage_layers: 1 needs parallel.pipeline above 1"),
        (2, {"parallel": {"pipeline": 2, "first_stage_layers": 0}}, "parallel.first_stage_layers: 0; at least 1"),
        (
            2,
            {"parallel": {"frozen": "sharded"}, "train": {"trainable": "all"}},
            "sharded has no effect with train.trainable",
        ),
        (2, {"parallel": {"frozen": "sharded", "pipeline": 2}}, "sharded has no ranks to spread weights over"),
        (2, {"parallel": {"dispatcher": "flex"}}, "flex needs parallel.expert or expert_tensor above 1; use alltoall"),
        (1, {"model": {"num_experts": 0}, "parallel": {"overlap_frozen": "off"}}, "overlap_frozen: off has no effect"),
        (1, {"parallel": {"overlap_param_gather": True}}, "needs parallel.overlap_grad_reduce: true"),
        (
            1,
            {"parallel": {"overlap_param_gather": True, "distributed_optimizer": False}},
            "parallel.overlap_param_gather: true needs parallel.distributed_optimizer: true",
        ),
    ],
)
def test_refused(arch, world_size, sections, expected):
    with pytest.raises(UserError) as error:
        check_recipe(recipe(**sections), arch, world_size)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "number, parallel",
    [
        (6, {"pipeline": 2, "first_stage_layers": 1}),
        (6, {"pipeline": 2, "last_stage_layers": 5}),
        (6, {"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 4, "virtual_pipeline": 2}),
        (6, {"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 1}),
        (7, {"pipeline": 4, "first_stage_layers": 1}),
        (10, {"pipeline": 3, "virtual_pipeline": 2, "first_stage_layers": 2}),
    ],
)
def test_uneven_splits(arch, number, parallel):
    sections = {"parallel": parallel, "train": {"global_batch_size": 12}}
    check_recipe(recipe(**sections), dataclasses.replace(arch, num_layers=number), parallel["pipeline"])


@pytest.mark.parametrize(
    "number, parallel, expected",
    [
        (6, {"pipeline": 2, "first_stage_layers": 6}, "6 of 6 layers leave 0 for 1 other pipeline stage(s)"),
        (6, {"pipeline": 2, "first_stage_layers": 6}, "the nearest valid are 4 and 5"),
        (6, {"pipeline": 3, "first_stage_layers": 3}, "which take equal shares; the nearest valid are 2 and 4"),
        (6, {"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 3}, "the nearest valid is 6"),
        (
            6,
            {"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 3},
            "parallel.first_stage_layers + parallel.last_stage_layers: 5 of 6 layers",
        ),
        (
            8,
            {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 3},
            "parallel.first_stage_layers: 3; a multiple of parallel.virtual_pipeline (2)",
        ),
        (
            7,
            {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2},
            "2 x 2 model chunks cannot share 7 layers",
        ),
    ],
)
def test_uneven_splits_refused(arch, number, parallel, expected):
    with pytest.raises(UserError) as error:
        check_recipe(recipe(parallel=parallel), dataclasses.replace(arch, num_layers=number), parallel["pipeline"])
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "trainable, frozen, expected",
    [
        ("routers", "replicated", None),
        ("all", "replicated", "parallel.overlap_frozen: on is not written for train.trainable: all"),
        ("routers", "auto", "parallel.overlap_frozen: on needs parallel.frozen: replicated"),
    ],
)
def test_overlap_frozen(arch, trainable, frozen, expected):
    checked = recipe(train={"trainable": trainable}, parallel={"overlap_frozen": True, "frozen": frozen})
    assert checked.parallel.overlap_frozen == "on"  # what YAML makes of the word
    if expected is None:
        return check_recipe(checked, arch, 1)
    with pytest.raises(UserError) as error:
        check_recipe(checked, arch, 1)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_interleaved_schedule_needs_rounds_of_micro_batches(arch):
    sections = {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "train": {"global_batch_size": 12}}
    with pytest.raises(UserError) as error:
        check_recipe(recipe(**sections), dataclasses.replace(arch, num_layers=4), 4)
    expected = "size x pipeline = 2 x 2 x 2, as parallel.virtual_pipeline needs; the nearest are 8 and 16"
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "layers, parallel, stage",
    [
        ((0, 1), {"pipeline": 2}, None),
        ((0, 1, 2), {"pipeline": 2}, "layers 0 to 2"),
        ((0, 1, 2), {"pipeline": 2, "last_stage_layers": 2}, None),
        ((4, 5), {"pipeline": 2, "last_stage_layers": 2}, "layers 4 to 5"),
        ((2,), {"pipeline": 3, "virtual_pipeline": 2}, "layers 2 to 2"),
    ],
)
def test_layers_without_experts_leave_each_stage_something_to_learn(arch, layers, parallel, stage):
    arch = dataclasses.replace(arch, num_layers=6, mlp_only_layers=layers)
    sections = {"parallel": parallel, "train": {"global_batch_size": 12}}
    if stage is None:
        check_recipe(recipe(**sections), arch, parallel["pipeline"])
    else:
        with pytest.raises(UserError, match=f"mlp_only_layers: .* {stage}"):
            check_recipe(recipe(**sections), arch, parallel["pipeline"])
    sections["train"]["trainable"] = "all"
    check_recipe(recipe(**sections), arch, parallel["pipeline"])
