"""Tiny random dense models, and the parameters that a Megatron rank holds."""

import pytest
import torch
from rank_shapes import empty_parameters, shapes_of_rank
from tiny_models import TINY, save_tiny


@pytest.fixture(scope="session", params=list(TINY))
def base(request, tmp_path_factory):
    """The folder of each tiny dense model in turn, fp32."""
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama_bf16(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama_bf16"), torch.bfloat16)


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    return save_tiny("llama_tied_llama3_head_dim", tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def empty_rank():
    """A function (arch, layout) -> a rank's parameters, full of NaN: what is not written shows."""

    return empty_parameters


@pytest.fixture(scope="session")
def trained():
    """A function (arch, num_frozen, num_experts) -> random parameters, so that all experts differ."""

    def parameters(arch, num_frozen, num_experts):
        shapes = shapes_of_rank(arch, layers=arch.num_layers, num_frozen=num_frozen, num_experts=num_experts)
        generator = torch.Generator().manual_seed(num_experts)
        return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}

    return parameters
