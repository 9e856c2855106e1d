"""Which parameters each policy trains, by name and in a built model."""

import pytest
import torch
from harness import make_batch, make_plan, make_recipe, make_trainer, unwrapped

from megatron_lpr.model.parameters import POLICIES
from megatron_lpr.model.rank import frozen as frozen_module
from megatron_lpr.model.rank.frozen import frozen_bytes, shards_frozen

LAYER = "decoder.layers.3."
GROUPS = {
    "new experts": [
        LAYER + "mlp.experts.local_experts.0.linear_fc1.weight",
        LAYER + "mlp.experts.local_experts.11.linear_fc2.weight",
        LAYER + "mlp.experts.linear_fc1.weight2",
        LAYER + "mlp.experts.linear_fc2.weight0",
    ],
    "routers": [LAYER + "mlp.router.weight"],
    "frozen": [
        LAYER + "mlp.frozen_experts.0.linear_fc1.weight",
        LAYER + "mlp.frozen_experts.1.linear_fc2.weight",
        LAYER + "mlp.linear_fc1.weight",
        LAYER + "self_attention.linear_qkv.weight",
        LAYER + "self_attention.linear_qkv.layer_norm_weight",
        LAYER + "input_layernorm.weight",
        LAYER + "pre_mlp_layernorm.weight",
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "decoder.final_layernorm.weight",
    ],
}
TRAINED = {
    "new_experts_and_routers": {"new experts", "routers"},
    "routers": {"routers"},
    "all": {"new experts", "routers", "frozen"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("group", GROUPS)
def test_policy(policy, group):
    for name in GROUPS[group]:
        assert POLICIES[policy](name) == (group in TRAINED[policy]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_only_trained_parameters_have_gradient_buffers_and_optimizer_state(megatron, toy_base, tmp_path, policy, dtype):
    from megatron_lpr.training.optimizer import optimizer_parameters, trainable_parameters
    from megatron_lpr.training.train import Trainer

    batch = make_batch([[(1, 8)], [(2, 8)]])
    sections = {"train": {"trainable": policy}, "model": {"num_experts": 4, "dtype": dtype}}
    trainer = Trainer(make_plan(make_recipe(toy_base, batch, tmp_path, sections), batch))
    trainer.train_step()
    trained = {name: p for name, p in unwrapped(trainer).named_parameters() if POLICIES[policy](name)}
    for name, parameter in unwrapped(trainer).named_parameters():
        assert parameter.requires_grad == hasattr(parameter, "main_grad") == (name in trained), name
    # in bfloat16 a sum over micro-batches and ranks would lose whatever is below a 256th of it
    assert all(parameter.main_grad.dtype is torch.float32 for parameter in trained.values())
    count = sum(p.numel() for p in trained.values())
    states = [state for part in trainer.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    assert sum(state["exp_avg"].numel() for state in states) == count
    assert all(state["exp_avg"].dtype == torch.float32 for state in states)
    buffers = [buffer for chunk in trainer.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    assert sum(p.numel() for buffer in buffers for p in buffer.params) == count
    if dtype == "bfloat16":
        masters = [m for part in trainer.optimizer.chained_optimizers for m in _masters(part)]
        assert sum(master.numel() for master in masters) == count
    assert trainable_parameters(trainer.chunks) == optimizer_parameters(trainer.optimizer) == count


def _masters(optimizer) -> list[torch.Tensor]:
    """The fp32 copies of bf16 parameters, and those that are fp32 themselves."""
    groups = [*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups]
    return [m for group in groups for m in group]


@pytest.mark.parametrize("policy", ["new_experts_and_routers", "routers"])
def test_large_frozen_weights_are_sharded_where_there_are_ranks(megatron, toy_base, tmp_path, monkeypatch, policy):
    trainer = make_trainer(toy_base, tmp_path, train={"trainable": policy})
    recipe, arch = trainer.recipe, trainer.plan.arch
    held = sum(p.nbytes for p in unwrapped(trainer).parameters() if not p.requires_grad)
    assert frozen_bytes(recipe, arch, 1) == held
    assert not shards_frozen(recipe, arch, 2)  # far from 16 GiB
    monkeypatch.setattr(frozen_module, "SHARDED_ABOVE", held)
    assert not shards_frozen(recipe, arch, 2)
    monkeypatch.setattr(frozen_module, "SHARDED_ABOVE", held - 1)
    assert shards_frozen(recipe, arch, 2) and not shards_frozen(recipe, arch, 1)
