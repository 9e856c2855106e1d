"""Work beside the main stream: what waits for what, and whose memory lives how long."""

import pytest
import torch
from streams import Stream, streams

from megatron_lpr.platform.side_stream import Beside, InTurn


def add_one(x, y):
    return (x + 1) * y


@pytest.mark.parametrize("schedule", [InTurn, Beside])
def test_output_and_gradients(monkeypatch, schedule):
    x, y = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    with streams(monkeypatch) as found:
        work = schedule(x, y)
        work.start(add_one)
        output = work.output()
        (output * 3.0)
    assert found.races == []
    assert not work._inputs[1].requires_grad  # or it would be computed for nothing
    (gradient,) = torch.autograd.grad(output.sum(), [x])
    assert output.tolist() == [4.0] * 3 and gradient.tolist() == [2.0] * 3


def test_it_waits_for_nothing_that_the_main_stream_is_given_afterwards(monkeypatch):
    with streams(monkeypatch) as found:
        work = Beside(torch.ones(3), torch.ones(3))
        before = found.main.kernels()
        torch.ones(3) + 1  # tokens travel
        work.start(add_one)
        (side,) = {stream for stream in work._side.knows if stream is not found.main}
        assert work._side.knows[found.main] <= before < found.main.kernels()
        assert side.kernels() > 0 and found.main.knows.get(side, 0) == 0
        work.output()
        assert found.main.knows[side] == side.kernels()


def test_layers_share_one_stream_and_its_memory(monkeypatch):
    with streams(monkeypatch) as found:
        x = torch.ones(3)
        for _ in range(3):
            work = Beside(x, x)
            work.start(add_one)
            x = work.output() + 1
    assert found.races == []
    assert {stream for stream, _ in found.calls} == {"main", "side"}


@pytest.mark.parametrize("schedule", [InTurn, Beside])
def test_a_gradient_that_is_read_beside_is_added_to_in_no_place(monkeypatch, schedule):
    """A sum hands one gradient to all its terms: what the main stream adds to in place must not be what is read."""
    leaf = torch.arange(3.0).requires_grad_()
    places = {}

    def noted(name, tensor):
        tensor.register_hook(lambda gradient: places.update({name: gradient.data_ptr()}))
        return tensor

    with streams(monkeypatch):
        x = noted("sum", leaf * 1)
        work = schedule(x)
        main = x * 3  # its gradient is added to the sum's while the work's is computed
        work.start(lambda x: noted("read", 2 * x))
        output = x + main + work.output()
    (output * output.detach()).sum().backward()
    assert leaf.grad.tolist() == [0.0, 36.0, 72.0]
    assert places["sum"] != places["read"]
    assert not getattr(work, "_still_read", [])


def test_inputs_are_held_until_the_backward_pass_has_read_them(monkeypatch):
    """PyTorch lets go of what an operation saved when it has launched the kernels that read it."""
    leaf = torch.arange(3.0).requires_grad_()
    held = []
    with streams(monkeypatch):
        x = leaf * 1
        place = x.data_ptr()
        work = Beside(x)
        work.start(torch.sin)  # saves its input
        output = work.output()
    work._inputs[0].register_hook(lambda _: held.append({tensor.data_ptr() for tensor in work._still_read}))
    output.sum().backward()
    assert place in held[0] and not work._still_read


def test_what_is_a_race(monkeypatch):
    side = Stream()
    with streams(monkeypatch) as found:
        x = torch.ones(3)
        with found.stream(side):
            y = x + 1
        assert found.races == ["aten.add.Tensor on side reads too early"]
        side.wait_stream(found.main)
        with found.stream(side):
            y = x + 1
        y * 2
        assert found.races[1:] == ["aten.mul.Tensor on main reads too early"]
        found.main.wait_stream(side)
        y * 2
        assert len(found.races) == 2
        with found.stream(side):
            x * 2
        del x
        torch.ones(3)
        assert found.races[2:] == ["aten.ones.default on main takes memory that another stream still reads"]
