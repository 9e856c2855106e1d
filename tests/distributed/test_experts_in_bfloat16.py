"""New experts at once, in few numbers of rows, on ranks that exchange tokens: the steps of Megatron's loop."""

from unittest import mock

import pytest
from harness import make_plan, make_recipe, mixed_batch


def steps_of_both(base, folder, world_size: int, parallel) -> list[list[tuple[float, float]]]:
    """(loss, gradient norm) of each step, at once and in the loop."""
    from megatron_lpr.model import grouped_experts
    from megatron_lpr.platform import leave_layout, megatron
    from megatron_lpr.training.train import Trainer

    model = {"num_experts": 5, "dtype": "bfloat16"}
    sections = {"model": model, "train": {"micro_batch_size": 1}, "parallel": parallel}
    found = []
    with megatron():
        for at_once in (True, False):
            recipe = make_recipe(base, mixed_batch(), folder / str(at_once), sections)
            with mock.patch.object(grouped_experts, "computes_at_once", lambda config, answer=at_once: answer):
                trainer = Trainer(make_plan(recipe, mixed_batch(), world_size=world_size))
            metrics = [trainer.train_step() for _ in range(2)]
            found.append([(step["ntp_loss"], step["grad_norm"]) for step in metrics])
            del trainer
            leave_layout()
    return found


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_same_steps(on_ranks, toy_base, tmp_path, dispatcher):
    parallel = {"expert": 2, "dispatcher": dispatcher}
    for at_once, looped in on_ranks(steps_of_both, 2, toy_base, tmp_path, 2, parallel):
        for own, theirs in zip(at_once, looped, strict=True):
            assert own == pytest.approx(theirs, rel=2e-3)
