"""Padding of the vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from harness import make_batch, make_plan, make_recipe


@pytest.mark.parametrize(
    "vocab_size, tensor_parallel, expected",
    [(128, 1, 128), (129, 1, 256), (257, 2, 512), (128256, 1, 128256), (128256, 2, 128256), (128256, 4, 128512)],
)
def test_padded_size(vocab_size, tensor_parallel, expected):
    from megatron_lpr.model.parameters import padded_vocab_size

    assert padded_vocab_size(vocab_size, tensor_parallel) == expected


def test_padding_takes_no_probability_whatever_its_rows_hold(megatron, toy_base, tmp_path):
    from megatron_lpr.training.train import Trainer

    batch = make_batch([[(1, 8)], [(2, 8)]])
    model = Trainer(make_plan(make_recipe(toy_base, batch, tmp_path, {}), batch)).chunks[0].module
    logits = torch.randn(8, 2, 384, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.from_numpy(batch.labels_BS)
    before = logits.detach().clone()
    losses = model.compute_language_model_loss(labels, logits.clone())
    expected = F.cross_entropy(before[..., :257].permute(1, 2, 0), labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert not logits.grad[..., 257:].any() and logits.grad[..., :257].all()
