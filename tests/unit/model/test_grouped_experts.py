"""The new experts at once, by a product each and in torch's grouped product, against Megatron's loop over them."""

import pytest
import torch
from harness import make_trainer, scramble, unwrapped


@pytest.fixture
def experts(megatron, toy_base, tmp_path):
    model = unwrapped(make_trainer(toy_base, tmp_path, train={"trainable": "new_experts_and_routers"}))
    scramble(model)
    return model.decoder.layers[0].mlp.experts


@pytest.fixture(params=["a_product_each", "one_kernel"])
def way(request, monkeypatch):
    from megatron_lpr.model import expert_products

    monkeypatch.setattr(expert_products, "in_one_kernel", lambda x: request.param == "one_kernel")


def both_ways(experts, tokens, monkeypatch):
    """(one by one, at once) of the output and of each gradient."""
    generator, dtype = torch.Generator().manual_seed(0), next(experts.parameters()).dtype
    hidden = torch.randn(sum(tokens), 32, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(sum(tokens), generator=generator, requires_grad=True)
    weights = [hidden, probs, *experts.parameters()]
    found = []
    for is_grouped in (False, True):
        monkeypatch.setattr(experts, "is_grouped", is_grouped)
        output, _ = experts(hidden, torch.tensor(tokens), probs)
        found.append([output, *torch.autograd.grad(output.sum(), weights)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("tokens", [(5, 0, 8), (0, 0, 3)])
def test_same_as_the_loop(experts, way, tokens, monkeypatch):
    for one_by_one, at_once in both_ways(experts, tokens, monkeypatch):
        torch.testing.assert_close(at_once, one_by_one)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_weights_are_waited_for_in_the_order_in_which_megatron_gathers_them(experts, is_grouped, monkeypatch):
    """That of registration (`overlap_param_gather`): in another it has some gathered late, and warns."""
    asked = []
    for module in experts.modules():
        module.register_forward_pre_hook(lambda module, _: asked.extend(module.parameters(recurse=False)))
    monkeypatch.setattr(experts, "is_grouped", is_grouped)
    experts(torch.ones(3, 32), torch.tensor([1, 0, 2]), torch.ones(3))
    assert list(map(id, asked)) == list(map(id, experts.parameters()))


def test_bfloat16_on_a_cpu_has_products_of_few_numbers_of_rows(experts, monkeypatch):
    from megatron_lpr.model import expert_products

    experts.to(torch.bfloat16)
    seen, products = set(), expert_products._products

    def told(x, ends_N, weights, **kwargs):
        seen.update(ends_N.diff(prepend=ends_N.new_zeros(1)).tolist())
        return products(x, ends_N, weights, **kwargs)

    monkeypatch.setattr(expert_products, "_products", told)
    for tokens in [(5, 0, 8), (16, 17, 1), (0, 0, 3)]:
        for one_by_one, at_once in both_ways(experts, tokens, monkeypatch):
            torch.testing.assert_close(at_once, one_by_one, rtol=2e-2, atol=1e-2)
    assert seen == {0, 16, 32}


def test_large_experts_and_few_keep_the_loop_on_a_gpu(experts, monkeypatch):
    from megatron_lpr.model import grouped_experts

    assert experts.is_grouped and grouped_experts.suits_grouping(experts.config)
    assert not grouped_experts.replaces_transformer_engine(experts.config)
    monkeypatch.setattr(grouped_experts, "LARGEST", 100)
    assert not grouped_experts.suits_grouping(experts.config)
