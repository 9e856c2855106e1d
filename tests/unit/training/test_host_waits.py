"""The host runs ahead of the device: in a step nothing of ours waits for it, in no layer and at no micro-batch."""

import pytest
import torch
from harness import make_trainer
from host_waits import host_waits

STAGES = {
    "stage1": {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.1}},
    "stage2": {"train": {"trainable": "routers"}, "lpr": {"coeff": 0.1}},
}


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_waits_where_megatron_does(megatron, toy_base, tmp_path, monkeypatch, stage, dispatcher, recompute):
    sections = STAGES[stage] | {"parallel": {"dispatcher": dispatcher}}
    sections["train"] = sections["train"] | {"recompute": recompute, "micro_batch_size": 2}
    trainer = make_trainer(toy_base, tmp_path, **sections)
    from megatron_lpr.model import expert_products

    monkeypatch.setattr(expert_products, "in_one_kernel", lambda x: True)  # as on a GPU
    with host_waits(monkeypatch) as waits:
        metrics = trainer.train_step()
    assert metrics["ntp_loss"] > 0 and not trainer.votes.count("stop")
    assert waits.of("megatron_lpr") == {}
    theirs = waits.of("megatron")
    assert any("dispatch" in what for what in theirs)  # the sizes of what experts compute: each layer, each time
    assert any("clip_grads" in what for what in theirs)  # the gradient norm: once a step


def positions(x):
    return x.nonzero()


@pytest.mark.parametrize(
    "wait, how",
    [
        (lambda x: x[x > 0], "index.Tensor"),
        (positions, "nonzero"),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.cpu().tolist(), "cpu"),
        (lambda x: x.repeat_interleave((x > 0).long()), "repeat_interleave"),
    ],
)
def test_what_is_a_wait(monkeypatch, wait, how):
    with host_waits(monkeypatch) as waits:
        wait(torch.ones(3))
    ((_, what),) = waits.counts
    assert how in what


def test_a_copy_that_is_read_too_early_is_a_wait(monkeypatch):
    from megatron_lpr.platform.to_host import ToHost

    numbers = torch.ones(3)
    with host_waits(monkeypatch) as waits:
        ToHost(numbers).read().tolist()
        assert waits.counts.total() == 1
        early = ToHost(numbers)
        numbers.sum().item()
        early.read().tolist()
    assert waits.counts.total() == 2
