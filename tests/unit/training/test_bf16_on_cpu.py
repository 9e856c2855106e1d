"""What a step in bfloat16 on a CPU does without: copies that nobody needs."""

import pytest
import torch
import torch.distributed as dist
from harness import make_trainer, unwrapped
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Names of the operators of a step, and of those that made a copy of an operand in another precision."""

    def __init__(self):
        super().__init__()
        self.names, self.copying = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.names.add(name)
        operands = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if name in ("add_", "mul") and any(x.dtype != result.dtype and x.numel() == result.numel() for x in operands):
            self.copying.add((name, result.numel()))
        return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_copy_of_all_gradients_or_weights(megatron, toy_base, tmp_path, dtype, monkeypatch):
    from megatron_lpr.training import main_grads

    monkeypatch.setattr(main_grads, "AT_ONCE", 1000)  # fewer than an expert has
    trainer = make_trainer(toy_base, tmp_path, model={"dtype": dtype})
    trainer.train_step()
    with Operators() as found:
        trainer.train_step()
    assert not [name for name in found.names if "reduce_scatter" in name or "allgather" in name]
    assert ("_fused_adamw_" in found.names) == (dtype == "bfloat16")
    assert all(name == "add_" and elements <= main_grads.AT_ONCE for name, elements in found.copying), found.copying


@pytest.mark.parametrize("micro_batch_size", [2, 1])
def test_gradients_are_added_as_megatron_adds_them(megatron, toy_base, tmp_path, monkeypatch, micro_batch_size):
    from megatron_lpr.platform import leave_layout
    from megatron_lpr.training import main_grads, optimizer

    def sums(name):
        model, train = {"dtype": "bfloat16"}, {"micro_batch_size": micro_batch_size, "trainable": "all"}
        trainer = make_trainer(toy_base, tmp_path / name, model=model, train=train)
        trainer.train_step()
        found = [p.main_grad.clone() for p in unwrapped(trainer).parameters()]
        del trainer
        leave_layout()
        return found

    monkeypatch.setattr(main_grads, "AT_ONCE", 100)
    ours = sums("ours")
    monkeypatch.setattr(optimizer, "add_in_parts", lambda chunks: None)
    assert all(torch.equal(one, other) for one, other in zip(ours, sums("megatrons"), strict=True))
    assert any(one.any() for one in ours)


def test_collectives_of_a_rank_alone(megatron):
    numbers, rest = torch.arange(6.0), torch.zeros(2, 3)
    dist.all_gather_into_tensor(numbers, numbers[:], group=dist.group.WORLD)
    dist.reduce_scatter_tensor(rest, numbers, op=dist.ReduceOp.SUM)
    assert rest.flatten().tolist() == numbers.tolist() == [0, 1, 2, 3, 4, 5]
