"""Packed documents that attend to themselves only are computed as if each stood alone."""

import dataclasses

import numpy as np
import pytest
import torch
from harness import EXPANDED, ORIGINAL, PADDING, gradients, make_batch, make_plan, make_recipe, scramble, unwrapped

SECTIONS = {"train": {"trainable": "all"}, "lpr": {"coeff": 0.5}, "data": {"reset_attention": True}}
# two rows of two documents each
LENGTHS = [(6, 10), (11, 5)]


def packed_and_alone():
    packed = make_batch([[(EXPANDED, first), (ORIGINAL, second)] for first, second in LENGTHS])
    numbers = np.array([[0] * first + [1] * second for first, second in LENGTHS], dtype=np.int32)
    packed = dataclasses.replace(packed, documents_BS=numbers)
    alone = make_batch([[(PADDING, 16)]] * 4)
    for row, (first, _) in enumerate(LENGTHS):
        for part, place in enumerate((slice(0, first), slice(first, 16))):
            for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "tags_BS"):
                document = getattr(packed, name)[row, place]
                getattr(alone, name)[2 * row + part, : len(document)] = document
    return packed, alone


def trainer_of(base, batch, tmp_path):
    from megatron_lpr.training.train import Trainer

    trainer = Trainer(make_plan(make_recipe(base, batch, tmp_path, SECTIONS), batch))
    scramble(unwrapped(trainer))
    return trainer


def logits(trainer, batch, documents_BS=None) -> torch.Tensor:
    from megatron_lpr.model.passengers import passengers

    with torch.no_grad():
        return unwrapped(trainer)(
            input_ids=torch.from_numpy(batch.tokens_BS),
            position_ids=None,
            **passengers(
                torch.from_numpy(batch.tags_BS), None if documents_BS is None else torch.from_numpy(documents_BS)
            ),
        )


def test_logits_of_packed_documents_are_those_of_each_alone(megatron, toy_base, tmp_path):
    packed, alone = packed_and_alone()
    trainer = trainer_of(toy_base, packed, tmp_path)
    together, apart = logits(trainer, packed, packed.documents_BS), logits(trainer, alone)
    seen_through = logits(trainer, packed)
    for row, (first, second) in enumerate(LENGTHS):
        torch.testing.assert_close(together[row, :first], apart[2 * row, :first], rtol=0, atol=1e-5)
        torch.testing.assert_close(together[row, first:], apart[2 * row + 1, :second], rtol=0, atol=1e-5)
        assert (seen_through[row, first:] - apart[2 * row + 1, :second]).abs().max() > 0.01


def test_a_step_on_packed_documents_is_one_on_each_alone(megatron, toy_base, tmp_path):
    packed, alone = packed_and_alone()
    from megatron_lpr.platform import leave_layout

    results = []
    for number, batch in enumerate((packed, alone)):
        trainer = trainer_of(toy_base, batch, tmp_path / str(number))
        for chunk in trainer.chunks:
            chunk.train()
        metrics = trainer.train_step()
        results.append((metrics, {name: grad.clone() for name, grad in gradients(trainer).items()}))
        leave_layout()
    (packed_metrics, packed_grads), (alone_metrics, alone_grads) = results
    for loss in ("ntp_loss", "lpr_loss"):
        assert packed_metrics[loss] == pytest.approx(alone_metrics[loss], rel=1e-6)
    for name, grad in packed_grads.items():
        torch.testing.assert_close(grad, alone_grads[name], rtol=0, atol=2e-6, msg=name)
