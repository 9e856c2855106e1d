"""The frozen experts on a side stream: the same numbers to the last bit, and nothing that a GPU could do too early."""

import itertools

import pytest
import torch
from harness import gradients, unwrapped
from layouts import trainer_of, write_source
from streams import streams


@pytest.fixture
def source(megatron, toy_base, tmp_path):
    from megatron_lpr.platform import leave_layout

    folder = write_source(toy_base, tmp_path / "source")
    leave_layout()
    return folder


def overlap_frozen(trainer) -> None:
    for layer in unwrapped(trainer).decoder.layers:
        layer.mlp.config.overlap_frozen = True


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("stage, recompute", [("stage1", "none"), ("stage2", "selective")])
def test_same_to_the_bit(source, toy_base, tmp_path, stage, recompute, dispatcher):
    from megatron_lpr.platform import leave_layout

    changes = {"train": {"recompute": recompute, "micro_batch_size": 4}, "parallel": {"dispatcher": dispatcher}}
    found = []
    for overlap in (False, True):
        trainer = trainer_of(toy_base, stage, tmp_path / str(overlap), changes, source=source)
        if overlap:
            overlap_frozen(trainer)
        metrics = trainer.train_step()
        grads = {name: gradient.clone() for name, gradient in gradients(trainer).items()}
        found.append(({name: metrics[name] for name in ("ntp_loss", "grad_norm")}, grads))
        del trainer
        leave_layout()
    (metrics, grads), (metrics_beside, grads_beside) = found
    assert metrics == metrics_beside and grads.keys() == grads_beside.keys()
    for name in grads:
        assert torch.equal(grads[name], grads_beside[name]), name


def test_frozen_experts_run_between_dispatch_and_new_experts(source, toy_base, tmp_path, monkeypatch):
    trainer = trainer_of(toy_base, "stage1", tmp_path, source=source)
    overlap_frozen(trainer)
    layer = unwrapped(trainer).decoder.layers[0].mlp
    with streams(monkeypatch) as found:

        def noted(name):
            method = getattr(layer, name)

            def call(*args):
                found.calls.append((found.current.name, name))
                return method(*args)

            monkeypatch.setattr(layer, name, call)

        for name in ("preprocess", "dispatch", "routed_experts_compute", "combine"):
            noted(name)
        x = torch.randn(16, 2, layer.config.hidden_size, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            x, _ = layer(x)
    assert found.races == []
    parts = [name if isinstance(name, str) else stream for stream, name in found.calls]
    steps = [part for part, _ in itertools.groupby(parts) if part != "main"]
    assert steps == ["preprocess", "dispatch", "side", "routed_experts_compute", "combine"] * 2
    products = {torch.ops.aten.mm.default, torch.ops.aten.linear.default}
    assert sum(stream == "side" and call in products for stream, call in found.calls) == 2 * 2
