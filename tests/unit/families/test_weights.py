"""Joined tensors of a base: read as their parts, and refused where they are not what config.json says."""

import pytest
import torch
from tiny_models import load_apart, rewrite, rewrite_config, save_tiny

from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.families.weights import open_weights
from megatron_lpr.model.load.upcycle import check_checkpoint

QKV = "model.layers.1.self_attn.qkv_proj.weight"
Q = QKV.replace("qkv", "q")


@pytest.fixture
def phi3(tmp_path):
    return save_tiny("phi3", tmp_path / "base")


def weights(folder):
    arch = read_architecture(folder)
    reader = open_weights(folder, arch)
    check_checkpoint(reader, arch)
    return reader


def test_parts_are_those_of_the_class(phi3):
    reader, expected = weights(phi3), load_apart(phi3)
    assert set(reader.keys()) == expected.keys() and QKV not in reader and Q in reader
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in expected.items())
    reader.bytes_read = 0
    reader.slice(Q)[3:5]
    assert reader.bytes_read == 2 * 32 * 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(QKV), "base' holds no tensor 'model.layers.1.self_attn.qkv_proj.weight'"),
        (lambda tensors: tensors.update({QKV: tensors[QKV][1:]}), r"qkv_proj.*has shape \(127, 32\).* says 128 rows"),
        (lambda tensors: tensors.update({Q: tensors[QKV][:64].clone()}), "which belongs into its '.*qkv_proj"),
    ],
    ids=["none", "short", "twice"],
)
def test_what_does_not_fit_is_named(phi3, change, message):
    with pytest.raises(UserError, match=message):
        weights(rewrite(phi3, change))


def test_heads_of_another_number(phi3):
    with pytest.raises(UserError, match="qkv_proj.* says 192 rows"):
        weights(rewrite_config(phi3, num_key_value_heads=4))
