"""Frozen weights that are there once: what a rank holds of them and reads, and a bit of them that flips."""

import pytest
import torch
from harness import make_plan, make_recipe, mixed_batch
from safetensors.torch import load_file

from megatron_lpr.errors import UserError
from megatron_lpr.testing.equal_runs import differences

REVIEW = {
    "model": {"num_experts": 5},
    "train": {"trainable": "routers", "micro_batch_size": 1, "steps": 2},
    "checkpoint": {"every": 1},
}


def trainer_of(base, folder, frozen: str, world_size: int, hooks=(), sections=REVIEW):
    from megatron_lpr.training.train import Trainer

    recipe = make_recipe(base, mixed_batch(), folder / frozen, sections | {"parallel": {"frozen": frozen}})
    return Trainer(make_plan(recipe, mixed_batch(), world_size=world_size), hooks)


def held_and_read(base, folder, world_size: int) -> dict[str, tuple[int, int, int]]:
    """Bytes of the frozen matrices, of norms, and of what is read of the base, either way."""
    from megatron_lpr.platform import leave_layout, megatron
    from megatron_lpr.platform.shards import own_part

    found = {}
    with megatron():
        for frozen in ("replicated", "sharded"):
            trainer = trainer_of(base, folder, frozen, world_size)
            parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
            frozen_ones = [own_part(p) for p in parameters if not p.requires_grad]
            matrices = sum(p.nbytes for p in frozen_ones if p.ndim == 2)
            norms = sum(p.nbytes for p in frozen_ones if p.ndim == 1)
            found[frozen] = (matrices, norms, trainer.bytes_read)
            del trainer, parameters, frozen_ones
            leave_layout()
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_and_reads_its_share(on_ranks, toy_base, tmp_path, ranks):
    of_ranks = on_ranks(held_and_read, ranks, toy_base, tmp_path, ranks)
    for found in of_ranks:
        matrices, norms, base_bytes = found["replicated"]  # every rank reads the whole base
        assert found["sharded"][:2] == (matrices // ranks, norms)
    assert base_bytes == sum(tensor.nbytes for tensor in load_file(toy_base / "model.safetensors").values())
    # each byte is read once, new experts being copies, but for the norms
    assert sum(found["sharded"][2] for found in of_ranks) == base_bytes + (ranks - 1) * norms


def flip_and_save(base, folder, world_size: int) -> str:
    from megatron_lpr.platform import leave_layout, megatron
    from megatron_lpr.platform.shards import is_sharded, own_part
    from megatron_lpr.training.hooks.hook import Hook

    class Flip(Hook):
        def after_step(self, trainer, metrics):
            weights = [p for chunk in trainer.chunks for p in chunk.parameters() if is_sharded(p)]
            if torch.distributed.get_rank() == 1 and trainer.step == 1:
                own_part(weights[-1]).view(-1)[-1:].view(torch.int32).bitwise_xor_(1)

    with megatron():
        trainer = trainer_of(base, folder, "sharded", world_size)
        trainer.hooks.insert(0, Flip())
        try:
            trainer.run()
            end = "finished"
        except UserError as error:
            end = str(error)
        del trainer
        leave_layout()
    return end


def test_a_flipped_bit_of_a_shard_is_found(on_ranks, toy_base, tmp_path):
    first, second = on_ranks(flip_and_save, 2, toy_base, tmp_path, 2)
    assert first == "a frozen weight has changed on rank 1"
    assert second.startswith("step 1: the frozen weight ") and "on rank 1" in second
    assert not list((tmp_path / "sharded" / "checkpoints").glob("step_*"))


def train_both_ways(base, folder, world_size: int, sections) -> None:
    from megatron_lpr.platform import leave_layout, megatron

    with megatron():
        for frozen in ("replicated", "sharded"):
            trainer = trainer_of(base, folder, frozen, world_size, sections=sections)
            trainer.run()
            del trainer
            leave_layout()


@pytest.mark.parametrize("trainable", ["routers", "new_experts_and_routers"])
def test_whole_checkpoints_in_bfloat16_are_the_same_either_way(on_ranks, toy_base, tmp_path, trainable):
    sections = REVIEW | {
        "model": {"num_experts": 5, "dtype": "bfloat16"},
        "train": REVIEW["train"] | {"trainable": trainable},
        "checkpoint": {"whole": True},
    }
    on_ranks(train_both_ways, 2, toy_base, tmp_path, 2, sections)
    assert not differences(tmp_path / "sharded", tmp_path / "replicated")
