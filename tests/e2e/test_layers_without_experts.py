"""Training where some layers are dense: losses are means over the layers that have a router."""

import pytest
import torch
from harness import gradients, make_plan, make_recipe, mixed_batch, unwrapped

from megatron_lpr.testing.toy_models import write_toy_model

ROUTER = "decoder.layers.1.mlp.router.weight"


def train_step(base, output, coeff):
    """One step of review: metrics, the router's gradient, its weight before and its input [S, B, H]."""
    from megatron.core import parallel_state

    from megatron_lpr.training.train import Trainer

    parallel_state.destroy_model_parallel()
    sections = {
        "model": {"num_experts": 3, "mlp_only_layers": [0, 2], "router_init_std": 0.5},
        "train": {"trainable": "routers"},
        "lpr": {"coeff": coeff},
    }
    batch = mixed_batch()
    trainer = Trainer(make_plan(make_recipe(base, batch, output, sections), batch))
    router, inputs = unwrapped(trainer).decoder.layers[1].mlp.router, []
    router.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].detach()))
    weight = router.weight.detach().clone()
    trainer.chunks[0].train()
    metrics = trainer.train_step()
    assert set(gradients(trainer)) == {ROUTER}
    return metrics, gradients(trainer)[ROUTER].clone(), weight, inputs[0]


def test_lpr_loss_is_the_mean_over_the_routers(megatron, tmp_path):
    base = write_toy_model(
        tmp_path / "base", architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=8, num_hidden_layers=3
    )
    metrics, with_loss, weight, input_SBH = train_step(base, tmp_path / "a", 0.5)
    _, without_loss, *_ = train_step(base, tmp_path / "b", 0.0)
    original_SB = torch.from_numpy(mixed_batch().tags_BS > 0).T
    weight.requires_grad_()
    loss = -(input_SBH[original_SB] @ weight.T).log_softmax(-1)[:, 0].mean()
    assert metrics["lpr_loss"] == pytest.approx(loss.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(0.5 * loss, weight)
    torch.testing.assert_close(with_loss - without_loss, gradient, rtol=1e-4, atol=1e-6)
    assert all(len(values) == 1 for language in metrics["router"].values() for values in language.values())
