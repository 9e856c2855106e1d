"""The rule of upcycling, on names and router rows."""

import dataclasses

import pytest
import torch
from tiny_models import save_tiny

from megatron_lpr.errors import UserError
from megatron_lpr.families import family_of, read_architecture
from megatron_lpr.families.expansion import (
    Expansion,
    check_upcycling,
    origins,
    router_rows,
    source_expert,
    with_layers_kept_dense,
    with_shared_expert,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return read_architecture(save_tiny("qwen2", tmp_path_factory.mktemp("qwen2")))


def with_experts(arch, num_experts=3):
    return dataclasses.replace(arch, num_experts=num_experts, topk=2)


@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("mlp_only_layers", [(), (1,)])
def test_every_tensor_of_the_class_has_an_origin_in_the_base(dense, num_experts, mlp_only_layers):
    arch = dataclasses.replace(dense, mlp_only_layers=mlp_only_layers)
    found, family = origins(arch, num_experts), family_of(arch)
    assert list(found) == list(family.shapes(arch, num_experts))
    bases = {origin.base for origin in found.values() if origin.kind == "copy"}
    assert bases == set(family.shapes(arch))  # each is used, none is invented
    routers = [origin.layer for origin in found.values() if origin.kind == "router"]
    assert routers == (arch.moe_layers() if num_experts else [])


def test_old_experts_stay_and_new_ones_are_copies_of_the_first(dense):
    assert [source_expert(dense, expert) for expert in range(3)] == [None, None, None]
    assert [source_expert(with_experts(dense), expert) for expert in range(6)] == [0, 1, 2, 0, 0, 0]
    found = origins(with_experts(dense), 5)
    assert found["model.layers.1.mlp.experts.2.up_proj.weight"].base == "model.layers.1.mlp.experts.2.up_proj.weight"
    assert found["model.layers.1.mlp.experts.4.up_proj.weight"].base == "model.layers.1.mlp.experts.0.up_proj.weight"


def test_old_router_rows_stay_and_new_ones_are_row_0_with_noise(dense):
    old = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()

    def rows(layer=1, **changes):
        expansion = Expansion(**{"num_experts": 64, "router_std": 0.05} | changes)
        return router_rows(dense, expansion, layer=layer, old=old)

    assert torch.equal(rows()[:3], old.float()) and rows().dtype == torch.float32
    noise = rows()[3:] - old[0].float()
    assert abs(noise.std() - 0.05) < 5e-3 and abs(noise.mean()) < 5e-3
    assert torch.equal(rows(), rows())
    assert not torch.equal(rows(), rows(router_seed=1)) and not torch.equal(rows(), rows(layer=0))
    assert torch.equal(rows(router_std=0.0)[3:], old[:1].float().expand(61, -1))
    assert torch.equal(rows(num_experts=3), old.float())


@pytest.mark.parametrize(
    "asked,message",
    [
        ({"num_experts": 0}, "has 3 experts already, so num_experts cannot be 0"),
        ({"num_experts": 4, "num_frozen": 2}, "to 3, not 2"),
        ({"num_experts": 4, "num_frozen": 4}, "at least one must be frozen and one new"),
        ({"num_experts": 4, "num_frozen": 3, "topk": 3}, "its top 2 experts; top-3"),
    ],
)
def test_what_a_model_of_three_experts_cannot_become(dense, asked, message):
    with pytest.raises(UserError, match=message):
        check_upcycling(with_experts(dense), Expansion(**asked))


def test_what_it_can_become(dense):
    for asked in ((3, 1), (3, 2), (4, 3), (9, 3)):
        check_upcycling(with_experts(dense), Expansion(num_experts=asked[0], num_frozen=asked[1]))
    check_upcycling(dense, Expansion())
    check_upcycling(dense, Expansion(num_experts=2, topk=2))


@pytest.mark.parametrize("layers", [(-1,), (2,), (0, 1)])
def test_layers_that_cannot_be_kept_dense(dense, layers):
    with pytest.raises(UserError, match="some, not all, of the layers 0 to 1"):
        with_layers_kept_dense(dense, layers)


def test_layers_kept_dense_are_a_set(dense):
    assert Expansion(num_experts=3, mlp_only_layers=(1, 0, 1)) == Expansion(num_experts=3, mlp_only_layers=(0, 1))
    assert with_layers_kept_dense(dense, (1, 1)).moe_layers() == [0]


def test_the_shared_expert_of_a_base_stays_as_wide(dense):
    """A dense base gets one of any width, of none at all too."""
    assert not [name for name in origins(with_shared_expert(dense, 0), 3) if "shared" in name and "gate." not in name]
    moe = dataclasses.replace(with_experts(dense), shared_expert_size=8)
    assert with_shared_expert(moe, 8) == moe
    with pytest.raises(UserError, match="one of width 8 already"):
        with_shared_expert(moe, 16)
    with pytest.raises(UserError, match="at least 0"):
        with_shared_expert(dense, -1)
