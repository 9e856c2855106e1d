"""The new experts in grouped products against Megatron's loop over them."""

import pytest
import torch
from harness import make_trainer, scramble, unwrapped


@pytest.fixture
def experts(megatron, toy_base, tmp_path):
    model = unwrapped(make_trainer(toy_base, tmp_path, train={"trainable": "new_experts_and_routers"}))
    scramble(model)
    return model.decoder.layers[0].mlp.experts


@pytest.mark.parametrize("tokens", [(5, 0, 8), (0, 0, 3)])
def test_same_as_the_loop(experts, tokens, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(tokens), 32, generator=generator, requires_grad=True)
    probs = torch.rand(sum(tokens), generator=generator, requires_grad=True)
    weights = [hidden, probs, *experts.parameters()]
    found = []
    for is_grouped in (False, True):
        monkeypatch.setattr(experts, "is_grouped", is_grouped)
        output, _ = experts(hidden, torch.tensor(tokens), probs)
        found.append([output, *torch.autograd.grad(output.sum(), weights)])
    for one_by_one, at_once in zip(*found, strict=True):
        torch.testing.assert_close(at_once, one_by_one)


def test_large_experts_and_cpus_keep_the_loop(experts, monkeypatch):
    from megatron_lpr.model import grouped_experts

    assert grouped_experts.suits_grouping(experts.config) and not experts.is_grouped
    monkeypatch.setattr(grouped_experts, "LARGEST", 100)
    assert not grouped_experts.suits_grouping(experts.config)
