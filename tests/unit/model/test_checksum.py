"""Any flipped bit shows, at any size, dtype and place; and the sum is the one that its definition says."""

import pytest
import torch

from megatron_lpr.model import checksum
from megatron_lpr.model.checksum import tensor_checksum, tensor_checksums

MASK = (1 << 64) - 1


def by_definition(tensor: torch.Tensor, chunk_words: int) -> int:
    octets = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    whole = len(octets) // 4
    words = [int.from_bytes(octets[4 * i : 4 * i + 4], "little", signed=True) for i in range(whole)]
    chunks = [words[i : i + chunk_words] for i in range(0, whole, chunk_words)] or [[]]
    chunks.append([int.from_bytes(octets[4 * whole :], "little")])
    total = 0
    for chunk in chunks:
        total *= checksum._NEXT_CHUNK
        total += sum(word * (2 * checksum._STRIDE * place + 1) for place, word in enumerate(chunk))
    total &= MASK
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [0, 1, 3, 8, 29, 64])
def test_it_is_what_its_definition_says(monkeypatch, dtype, size):
    monkeypatch.setattr(checksum, "_CHUNK_WORDS", 3)
    tensor = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    assert tensor_checksum(tensor).item() == by_definition(tensor, 3)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 13), (torch.bfloat16, 31)])
def test_any_flipped_bit_changes_it(monkeypatch, dtype, size):
    monkeypatch.setattr(checksum, "_CHUNK_WORDS", 2)
    tensor = torch.randn(size).to(dtype)
    before, octets = tensor_checksum(tensor).item(), tensor.view(torch.uint8)
    seen = {before}
    for place in range(octets.numel()):
        for bit in range(8):
            octets[place] ^= 1 << bit
            seen.add(tensor_checksum(tensor).item())
            octets[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * octets.numel()
    assert tensor_checksum(tensor).item() == before


def test_values_that_have_changed_places_change_it(monkeypatch):
    monkeypatch.setattr(checksum, "_CHUNK_WORDS", 4)
    tensor = torch.arange(40, dtype=torch.int64)
    sums = {tensor_checksum(tensor.roll(shift)).item() for shift in range(40)}
    assert len(sums) == 40


def test_a_view_counts_as_its_own_values():
    whole = torch.randn(6, 7)
    for view in (whole.T, whole[1:, 2:5], whole.flatten()[1:]):
        assert tensor_checksum(view) == tensor_checksum(view.clone(memory_format=torch.contiguous_format))
    assert tensor_checksums([whole, whole[1:]]).tolist() == [tensor_checksum(t).item() for t in (whole, whole[1:])]
    assert tensor_checksums([]).tolist() == []
