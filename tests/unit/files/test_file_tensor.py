"""Reading ranges of a tensor at an odd offset of a file, against the tensor in memory."""

import errno
import os

import pytest
import torch

from megatron_lpr.errors import UserError
from megatron_lpr.files import file_tensor
from megatron_lpr.files.file_tensor import FileTensor, tensor_bytes

VALUES = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def pair(request, tmp_path):
    values = VALUES.to(request.param)
    (tmp_path / "file").write_bytes(b"odd" + bytes(tensor_bytes(values)) + b"rest")
    return values, FileTensor(tmp_path / "file", 3, request.param, tuple(values.shape))


def test_ranges(pair):
    values, stored = pair
    assert torch.equal(stored[:], values)
    assert torch.equal(stored[1:3], values[1:3]) and torch.equal(stored[:, 1:2], values[:, 1:2])
    assert torch.equal(stored.select(0, 2)[1:3], values[2][1:3])
    assert torch.equal(stored.narrow(0, 2, 3), values[2:]) and torch.equal(
        stored.select(0, 4).narrow(1, 1, 2), values[4][:, 1:]
    )
    assert stored[3:3].shape == (0, 4, 3)


def test_only_the_rows_asked_for_are_read(pair):
    values, stored = pair
    with open(stored.path, "r+b") as file:
        file.truncate(3 + 2 * values[0].numel() * values.itemsize)
    assert torch.equal(stored[:2], values[:2])
    with pytest.raises(UserError, match="is truncated"):
        stored[:3]


def test_file_that_is_gone(pair):
    _, stored = pair
    stored.path.unlink()
    with pytest.raises(UserError, match="cannot read .*No such file"):
        stored[:]


@pytest.mark.parametrize("kernel", [True, False], ids=["by_the_kernel", "in_blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_into_a_file(pair, tmp_path, monkeypatch, dtype, kernel):
    values, stored = pair
    if not kernel:

        def elsewhere(*arguments):
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "copy_file_range", elsewhere)
    monkeypatch.setattr(file_tensor, "_BLOCK_BYTES", 60)
    target = tmp_path / "target"
    target.write_bytes(b"." * 7)
    with open(target, "r+b") as file:
        stored.rows(1, 4).copy_to(file.fileno(), 5, dtype)
    assert target.read_bytes() == b"." * 5 + bytes(tensor_bytes(values[1:4].to(dtype)))


def test_copy_of_a_file_that_was_cut_off(pair, tmp_path):
    _, stored = pair
    with open(stored.path, "r+b") as file:
        file.truncate(20)
    with open(tmp_path / "target", "wb") as file, pytest.raises(UserError, match="is truncated"):
        stored.copy_to(file.fileno(), 0, stored.dtype)
