"""A rehearsed rank: what is planned of it, and a run that is far too large for this machine."""

import errno
import os
import re
from multiprocessing.synchronize import SemLock

import pytest

from megatron_lpr import cli
from megatron_lpr.families import read_architecture
from megatron_lpr.planning.planned import planned
from megatron_lpr.planning.rehearsal import Part, rehearse
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.testing.toy_models import write_toy_model

pytestmark = [pytest.mark.slow, pytest.mark.megatron]
# ranks, sizes, and what trains; experts can share the tokens of a rank evenly
LAYOUTS = {
    "tensor_and_data": (8, {"tensor": 2}, {"micro_batch_size": 2}),
    "tensor_inside_experts": (4, {"tensor": 2, "expert_tensor": 2, "distributed_optimizer": False}, {}),
    "everything_learns": (4, {"tensor": 2}, {"trainable": "all"}),
    "all_gather_of_tokens": (4, {"expert": 4, "dispatcher": "allgather"}, {"trainable": "routers"}),
    "context": (4, {"context": 2, "tensor": 2}, {}),
    "norms_across_heads": (4, {"tensor": 2}, {"recompute": "full"}),
    "norms_across_heads_learn": (4, {"tensor": 2}, {"trainable": "all"}),
    "norms_across_heads_of_one_rank": (4, {}, {"trainable": "all"}),
    "many_micro_batches": (8, {"pipeline": 2, "expert": 2}, {"global_batch_size": 64}),
    "everything": (16, {"tensor": 2, "context": 2, "pipeline": 2, "expert": 2}, {"recompute": "selective"}),
    "interleaved": (
        4,
        {"pipeline": 2, "virtual_pipeline": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
        {"recompute": "full", "global_batch_size": 32},
    ),
    "sharded": (8, {"tensor": 2, "frozen": "sharded"}, {}),
    "sharded_and_interleaved": (
        16,
        {"pipeline": 2, "virtual_pipeline": 2, "frozen": "sharded"},
        {"global_batch_size": 64},
    ),
    "sharded_middle": (16, {"pipeline": 4, "frozen": "sharded"}, {"global_batch_size": 64, "recompute": "selective"}),
    "sharded_review_kept": (4, {"frozen": "sharded"}, {"trainable": "routers"}),
    "sharded_review": (4, {"frozen": "sharded"}, {"trainable": "routers", "recompute": "full"}),
}
EXACT = ("frozen", "trained", "gradients", "optimizer", "gathered")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    root, olmo2 = tmp_path_factory.mktemp("rehearsal"), {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    llama = write_toy_model(root / "llama", num_hidden_layers=4, dtype="bfloat16")
    olmo2 = write_toy_model(root / "olmo2", num_hidden_layers=4, dtype="bfloat16", **olmo2)
    parts = []
    for name, (world_size, parallel, train) in LAYOUTS.items():
        base = olmo2 if "across_heads" in name else llama
        tree = {
            "name": "rehearsal",
            "output": "none",
            "model": {"base": str(base), "num_experts": 5, "dtype": "bfloat16", "spec": "local"},
            "data": {"manifest": "none", "seq_length": 40},
            "train": {"trainable": "new_experts_and_routers", "steps": 1, "global_batch_size": 8, "micro_batch_size": 1}
            | train,
            "balance": {"coeff": 0.1},
            "parallel": parallel,
        }
        recipe = from_tree(Recipe, tree, where="test")
        parts.append(Part(recipe=recipe, arch=read_architecture(base), world_size=world_size, rank=world_size // 2))
    return dict(zip(LAYOUTS, zip(parts, rehearse(parts), strict=True), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_as_rehearsed(rehearsed, name):
    part, found = rehearsed[name]
    memory, traffic = planned(part.recipe, part.arch, part.world_size, part.rank)
    for kind in EXACT:
        assert getattr(memory, kind) == getattr(found.memory, kind), kind
    assert memory.activations + memory.logits == pytest.approx(found.memory.activations + found.memory.logits, rel=0.05)
    # a norm of four bytes is not planned
    assert dict(traffic) == {key: amount for key, amount in found.traffic.items() if key[1] != "world"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rank", "3"], "--rank 3: without effect; add --rehearse"),
        (["--rehearse", "--json"], "--rehearse --json: a rehearsal is printed for people only; give one of the two"),
        (["--rehearse", "--rank", "8"], "--rank 8: ranks of 8 GPUs are 0 to 7"),
    ],
)
def test_what_cannot_be_rehearsed(words, message, root, capsys):
    base = "model.base=examples/plan/llama-3.2-1b"
    assert cli.main(["plan", "examples/recipes/stage1.yaml", "--gpus", "8", "--set", base, *words]) == 2
    assert message in capsys.readouterr().err


def test_no_shared_memory_is_named(root, capsys, monkeypatch):
    def nowhere(*arguments, **options):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(SemLock, "__init__", nowhere)
    base = "model.base=examples/plan/llama-3.2-1b"
    assert cli.main(["plan", "examples/recipes/stage1.yaml", "--gpus", "8", "--set", base, "--rehearse"]) == 2
    message = (
        r"error: cannot start a process to rehearse in: No such file or directory; its semaphores want .* /dev/shm"
    )
    assert re.search(message, capsys.readouterr().err)
