"""A rank that is slow in computing is named on all of them, though all end their steps together."""

import time

import torch.distributed as dist
from harness import make_plan, make_recipe, mixed_batch

SLEEP = 1.0


def records(base, folder) -> list[tuple]:
    from megatron_lpr.platform import leave_layout, megatron
    from megatron_lpr.training.hooks.hook import Hook

    class Look(Hook):
        def before_step(self, trainer):
            dist.barrier()  # or rank 0 may begin its step when rank 1 has slept for a while

        def after_step(self, trainer, metrics):
            seen.append((metrics["step"], metrics["seconds"], metrics.get("ranks")))

    seen: list[tuple] = []
    with megatron() as ranks:
        from megatron_lpr.training import step
        from megatron_lpr.training.train import Trainer

        real = step.next_token_loss

        def slow(*arguments):
            time.sleep(SLEEP * ranks.rank)
            return real(*arguments)

        step.next_token_loss = slow
        train = {"trainable": "routers", "steps": 2, "micro_batch_size": 2}
        sections = {"train": train, "logging": {"stragglers_every": 2}}
        for overlap in (False, True):
            sections["parallel"] = {"overlap_grad_reduce": overlap}
            recipe = make_recipe(base, mixed_batch(), folder / str(overlap), sections)
            Trainer(make_plan(recipe, mixed_batch(), world_size=2), [Look()]).run()
            leave_layout()
        step.next_token_loss = real
    return seen


def test_the_slow_rank(on_ranks, toy_base, tmp_path):
    first, second = on_ranks(records, 2, toy_base, tmp_path)
    assert [ranks for *_, ranks in first] == [ranks for *_, ranks in second]
    assert [(step, ranks is None) for step, _, ranks in first] == [(1, True), (2, False)] * 2
    assert min(seconds for _, seconds, _ in first) > 0.9 * SLEEP  # rank 0 waits for rank 1
    for ranks in (first[1][2], first[3][2]):
        slowest = ranks["compute_seconds"]
        assert slowest["rank"] == 1 and slowest["max"] > 0.9 * SLEEP
        assert ranks["memory_gb"]["max"] > 0.01
