"""A rehearsed rank holds and sends what a real rank of the same layout does, to the byte."""

import pytest
from layouts import recipe_of
from rehearsals import count_really

from megatron_lpr.families import read_architecture
from megatron_lpr.planning.rehearsal import Part, rehearse
from megatron_lpr.testing.toy_models import write_toy_model

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
CASES = {
    "tp2_pp2_ep2": ({"tensor": 2, "pipeline": 2, "expert": 2}, {}),
    "pp2_vpp2_everything_learns": (
        {"pipeline": 2, "virtual_pipeline": 2} | OVERLAP,
        {"trainable": "all", "recompute": "full"},
    ),
    "cp2_tp2": ({"context": 2, "tensor": 2}, {}),
}
RANKS = (0, 3)  # of four: another pipeline stage, and another part of everything else


@pytest.fixture(scope="module")
def counted(on_ranks, tmp_path_factory):
    """By case and rank: what was rehearsed, and what was real."""
    base = write_toy_model(tmp_path_factory.mktemp("rehearsal") / "base", num_hidden_layers=4, tie_word_embeddings=True)
    arch = read_architecture(base)
    recipes = [
        recipe_of(base, "stage1", base / "run", {"parallel": parallel, "train": train, "data": {"seq_length": 40}})
        for parallel, train in CASES.values()
    ]
    real = on_ranks(count_really, 4, [(recipe, arch) for recipe in recipes])
    parts = [
        Part(recipe=recipe, arch=arch, world_size=4, rank=rank, device="cpu") for rank in RANKS for recipe in recipes
    ]
    rehearsed = iter(rehearse(parts))
    return {(name, rank): (next(rehearsed), real[rank][i]) for rank in RANKS for i, name in enumerate(CASES)}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_rehearsed_as_real(counted, name, rank):
    rehearsed, (memory, traffic) = counted[name, rank]
    assert dict(rehearsed.traffic) == dict(traffic)
    assert rehearsed.memory == memory
