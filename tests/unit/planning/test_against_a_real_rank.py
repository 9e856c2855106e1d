"""What is planned of a rank is what a real one holds: parameters, gradient buffers, optimizer state, saved tensors."""

import pytest
import torch
from harness import make_trainer

from megatron_lpr.model.loss_chunks import CHUNK_BYTES
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.planning.activations import Activations
from megatron_lpr.planning.head import Head
from megatron_lpr.planning.planned import PlannedRank, planned
from megatron_lpr.testing.toy_models import write_toy_model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of toys: untied, tied with biases, normed queries and keys, norms of all heads and after."""
    root = tmp_path_factory.mktemp("bases")
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
    olmo2 = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    return {
        name: write_toy_model(root / name, num_hidden_layers=3, dtype="bfloat16", **config)
        for name, config in {"llama": {}, "qwen2": qwen2, "qwen3": qwen3, "olmo2": olmo2}.items()
    }


def trained(base, tmp_path, trainable, **sections):
    model = {"dtype": "bfloat16", "spec": "local"} | sections.pop("model", {})
    return make_trainer(base, tmp_path, model=model, train={"trainable": trainable} | sections.pop("train", {}))


@pytest.mark.parametrize(
    "name, trainable",
    [("llama", "new_experts_and_routers"), ("qwen3", "routers"), ("qwen2", "all"), ("qwen3", "all"), ("olmo2", "all")],
)
def test_parameters_gradients_and_optimizer(name, trainable, bases, tmp_path, megatron):
    trainer = trained(bases[name], tmp_path, trainable)
    trainer.train_step()
    memory, _ = planned(trainer.recipe, trainer.plan.arch, 1, 0)
    real = {
        parameter_name.removeprefix("module.module."): parameter
        for parameter_name, parameter in trainer.chunks[0].named_parameters()
    }
    rank = PlannedRank(trainer.recipe, trainer.plan.arch, 1, 0)
    assert {p.name: (p.elements, p.learns) for p in rank.chunks[0]} == {
        parameter_name: (parameter.numel(), parameter.requires_grad) for parameter_name, parameter in real.items()
    }
    assert [p.name for p in rank.chunks[0]] == list(real), "in another order buckets would be other ones"
    assert memory.trained == sum(p.nbytes for p in real.values() if p.requires_grad)
    assert memory.frozen == sum(p.nbytes for p in real.values() if not p.requires_grad)
    buffers = [buffer for chunk in trainer.chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    assert memory.gradients == sum(buffer.grad_data.nbytes for buffer in buffers)
    assert memory.optimizer == optimizer_bytes(
        trainer.optimizer, {p.data.untyped_storage().data_ptr() for p in real.values()}
    )


def optimizer_bytes(optimizer, weights):
    """fp32 weights that are not the model's own, and moments; Adam's count of steps is a scalar of each parameter."""
    found = 0
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                assert parameter.dtype is torch.float32
                state = [tensor for name, tensor in part.optimizer.state[parameter].items() if name != "step"]
                found += sum(tensor.nbytes for tensor in state)
                found += parameter.nbytes * (parameter.untyped_storage().data_ptr() not in weights)
    return found


@pytest.mark.parametrize(
    "name, trainable, recompute",
    [
        ("llama", "new_experts_and_routers", "none"),
        ("llama", "new_experts_and_routers", "selective"),
        ("llama", "new_experts_and_routers", "full"),
        ("llama", "routers", "none"),
        ("llama", "all", "none"),
        ("olmo2", "routers", "none"),
        ("olmo2", "all", "none"),
    ],
)
def test_saved_tensors(name, recompute, trainable, bases, tmp_path, megatron):
    trainer = trained(bases[name], tmp_path, trainable, train={"recompute": recompute}, model={"num_experts": 2})
    recipe, arch = trainer.recipe, trainer.plan.arch
    saved = saved_bytes(trainer)
    activations = Activations(recipe, arch, recipe.train, "cpu")
    layers = Layers(recipe, arch, PlannedRank(recipe, arch, 1, 0).place, recipe.train)
    expected = (
        Head(activations).saved()
        + Head(activations).logits()
        + sum(
            number * activations.saved(has_experts=kind.has_experts, below_learns=kind.below_learns)
            for kind, number in layers.kinds.items()
        )
    )
    assert saved == pytest.approx(expected, rel=0.1)


def saved_bytes(trainer):
    """Of the forward pass of the trainer's batch, each storage once; the batch and the weights are there anyway."""
    there = {p.untyped_storage().data_ptr() for p in trainer.chunks[0].parameters()}
    storages = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in there and tensor.numel() > 1:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        from megatron_lpr.model.passengers import passengers

        batch = trainer.plan.sampler.fill(0, trainer.plan.train.micro_batch_size)
        tokens, labels, tags = (torch.from_numpy(x) for x in (batch.tokens_BS, batch.labels_BS, batch.tags_BS))
        losses = trainer.chunks[0](input_ids=tokens, position_ids=None, labels=labels, **passengers(tags, None))
        found = sum(storage.nbytes() for storage in storages.values())
    assert losses.requires_grad
    return found


@pytest.mark.megatron
def test_chunks_of_the_loss(megatron_imported):
    from megatron_lpr.model import output_layer

    assert CHUNK_BYTES == output_layer.CHUNK_BYTES
