"""The loss in chunks of tokens: the same as over all logits at once, without them."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import gradients, make_trainer, scramble, unwrapped
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS, HIDDEN, COLUMNS, TRUE = 50, 16, 384, 257
STAGES = {
    "stage1": {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.1}},
    "stage2": {"train": {"trainable": "routers"}, "lpr": {"coeff": 0.1}},
    "moe_full": {"train": {"trainable": "all"}},
}


def chunked(x, weight, labels, *, rows):
    from megatron_lpr.model.output_layer import ChunkedLoss, VocabularyShard

    group = SimpleNamespace(size=lambda: 1)
    shard = VocabularyShard(first=0, true=TRUE, group=group)
    return ChunkedLoss.apply(x, weight, labels, shard, rows)


def numbers(*shape, seed, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("rows", [7, 25, 64])
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True), (False, False)])
def test_losses_and_gradients_are_cross_entropys(megatron, rows, learns):
    x, weight = numbers(TOKENS, HIDDEN, seed=0), numbers(COLUMNS, HIDDEN, seed=1)
    labels = torch.randint(TRUE, (TOKENS,), generator=torch.Generator().manual_seed(2))
    of_tokens = numbers(TOKENS, seed=3)
    copies = [tensor.double().requires_grad_(learn) for tensor, learn in zip((x, weight), learns, strict=True)]
    expected = F.cross_entropy(copies[0] @ copies[1][:TRUE].T, labels, reduction="none")
    losses = chunked(x.requires_grad_(learns[0]), weight.requires_grad_(learns[1]), labels, rows=rows)
    torch.testing.assert_close(losses, expected.float())
    if any(learns):
        (losses * of_tokens).sum().backward()
        (expected * of_tokens).sum().backward()
    for tensor, copy in zip((x, weight), copies, strict=True):
        assert (tensor.grad is None) == (copy.grad is None)
        if copy.grad is not None:
            torch.testing.assert_close(tensor.grad, copy.grad.float(), rtol=1e-4, atol=1e-5)


def test_bf16_is_as_close_as_the_whole(megatron):
    """A gradient is rounded once more, before it meets the weight of its token."""
    x, weight = numbers(TOKENS, HIDDEN, seed=0), numbers(COLUMNS, HIDDEN, seed=1)
    labels = torch.randint(TRUE, (TOKENS,), generator=torch.Generator().manual_seed(2))
    exact, whole, parts = (x.bfloat16().to(d).requires_grad_() for d in (torch.float64, torch.bfloat16, torch.bfloat16))
    for hidden in (exact, whole):
        logits = hidden @ weight.bfloat16()[:TRUE].to(hidden.dtype).T
        (F.cross_entropy(logits.float() if hidden is whole else logits, labels, reduction="none") / 3).sum().backward()
    (chunked(parts, weight.bfloat16(), labels, rows=7) / 3).sum().backward()
    errors = [(hidden.grad.double() - exact.grad).norm() / exact.grad.norm() for hidden in (whole, parts)]
    assert errors[1] < 1.5 * errors[0]


def test_a_weights_gradient_is_summed_in_fp32(megatron):
    """Over many chunks: in bfloat16 a sum of ones stays at 256."""
    weight = torch.zeros(COLUMNS, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked(
        torch.ones(600, 1, dtype=torch.bfloat16), weight, torch.zeros(600, dtype=torch.int64), rows=1
    ).sum().backward()
    assert weight.grad[0].item() == pytest.approx(600 * (1 / TRUE - 1), rel=2**-8)


@pytest.mark.parametrize("base", ["toy_base", "toy_tied"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_in_chunks_is_the_same_step(megatron, request, tmp_path, monkeypatch, base, stage):
    from megatron_lpr.model import output_layer
    from megatron_lpr.platform import leave_layout

    found = {}
    for chunk_bytes in (1 << 28, 5 * 4 * COLUMNS):  # 5 tokens
        monkeypatch.setattr(output_layer, "CHUNK_BYTES", chunk_bytes)
        trainer = make_trainer(request.getfixturevalue(base), tmp_path, **STAGES[stage])
        scramble(unwrapped(trainer))
        found[chunk_bytes] = trainer.train_step(), gradients(trainer)
        leave_layout()
    (whole, whole_gradients), (parts, gradients_of_parts) = found.values()
    for name in ("ntp_loss", "grad_norm", "balance_loss", "lpr_loss"):
        assert parts[name] == (whole[name] and pytest.approx(whole[name], rel=1e-6)), name
    assert parts["ntp_loss_per_language"] == pytest.approx(whole["ntp_loss_per_language"], rel=1e-6)
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(gradients_of_parts[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside it have had at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.most, self._seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.most = max(self.most, self.live)
        return result

    def _add(self, storage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key, size) -> None:
        self._seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("learns", [False, True])
def test_never_more_than_two_chunks_of_logits_are_there(megatron, learns):
    rows = 64
    x = numbers(1024, HIDDEN, seed=0, dtype=torch.bfloat16).requires_grad_()
    weight = numbers(2048, HIDDEN, seed=1, dtype=torch.bfloat16).requires_grad_(learns)
    labels = torch.randint(TRUE, (1024,))
    with LiveBytes() as memory:
        chunked(x, weight, labels, rows=rows).sum().backward()
    hidden_and_weight = 4 * (x.numel() + 2 * learns * weight.numel()) + 100 * len(x)
    assert memory.most < 2 * 4 * rows * len(weight) + hidden_and_weight < 4 * 1024 * len(weight) / 4
