"""Ranges of a tensor's numbers as boxes, against the tensor itself."""

import pytest
import torch

from megatron_lpr.checkpoint.boxes import boxes


@pytest.mark.parametrize("shape, most", [((7,), 1), ((3, 4), 3), ((1, 5), 1), ((5, 1), 1), ((2, 3, 4), 5)])
def test_boxes_are_the_range_in_its_order(shape, most):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(tensor.numel() + 1):
        for stop in range(start, tensor.numel() + 1):
            cut = list(boxes(shape, start, stop))
            parts = [
                tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] for offsets, sizes in cut
            ]
            assert [tuple(part.shape) for part in parts] == [sizes for _, sizes in cut]
            assert [number for part in parts for number in part.flatten().tolist()] == list(range(start, stop))
            assert len(cut) <= most
