"""The frozen experts against their formula, token by token."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_lpr.platform.to_host import ToHost

CONFIG = SimpleNamespace(
    bias_activation_fusion=False,
    hidden_size=8,
    moe_ffn_hidden_size=12,
    params_dtype=torch.float64,
    sequence_parallel=True,
    fp8=None,
)


@pytest.fixture
def experts(megatron):
    from megatron_lpr.model.frozen_expert import FrozenExpert

    generator = torch.Generator().manual_seed(0)
    experts = torch.nn.ModuleList(FrozenExpert(CONFIG) for _ in range(2))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    # Megatron has compiled its fused activation for the processor, which not every compiler and every processor can
    with torch.compiler.set_stance("force_eager"):
        yield experts


def ffn(expert, x):
    gate, up = expert.linear_fc1.weight.chunk(2)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ expert.linear_fc2.weight.T


def test_sum_over_the_experts_that_a_token_chose(experts):
    from megatron_lpr.model.frozen_expert import add_frozen_experts

    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    chosen = torch.tensor([[True, True], [True, False], [False, True], [False, False], [True, False]])
    probs = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * chosen
    probs.requires_grad_()
    expected = sum(probs[:, j, None] * ffn(expert, x) for j, expert in enumerate(experts))
    output = add_frozen_experts(experts, ToHost(chosen.sum(0)), x, probs, chosen)
    torch.testing.assert_close(output, expected)
    (x_grad, probs_grad), (x_expected, probs_expected) = (
        torch.autograd.grad(y.sin().sum(), [x, probs]) for y in (output, expected)
    )
    torch.testing.assert_close(x_grad, x_expected)
    torch.testing.assert_close(probs_grad, probs_expected * chosen)


def test_of_what_it_adds_up_an_expert_keeps_its_output_alone(experts):
    """The gradient of the weights needs it; not the product with them too, which torch's index_add would keep."""
    from megatron_lpr.model.frozen_expert import add_frozen_experts

    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[True, True], [True, False], [False, True], [False, False], [True, False]])
    probs = chosen.double().requires_grad_()
    kept: dict[int, tuple[int, ...]] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = add_frozen_experts(experts, ToHost(chosen.sum(0)), x, probs, chosen)
    assert sorted(shape for shape in kept.values() if shape[-1] == 8 and shape[0] < 5) == [(2, 8), (3, 8)]
    assert output.requires_grad


def test_fused_swiglu_is_the_same_and_keeps_its_input_only(experts, monkeypatch):
    expert, x = experts[0], torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    found, kept = [], []
    for fused in (False, True):
        monkeypatch.setattr(CONFIG, "bias_activation_fusion", fused)
        sizes: dict[int, int] = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = expert(x)
        for parameter in expert.parameters():
            sizes.pop(parameter.untyped_storage().data_ptr(), None)
        kept.append(sum(sizes.values()))
        found.append((output.detach(), *torch.autograd.grad(output.sin().sum(), [x])))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)
    assert kept == [3 * 5 * 12 * 8, 2 * 5 * 12 * 8]


def test_no_token_chose_a_frozen_expert(experts):
    from megatron_lpr.model.frozen_expert import add_frozen_experts

    x = torch.ones(3, 8, dtype=torch.float64)
    none = torch.zeros(3, 2, dtype=torch.bool)
    assert not add_frozen_experts(experts, ToHost(none.sum(0)), x, none.double(), none).any()


def test_weights_ask_for_no_gradient(experts):
    for parameter in experts.parameters():
        assert not parameter.requires_grad and parameter.sequence_parallel
