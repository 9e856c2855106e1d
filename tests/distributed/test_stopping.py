"""A rank that a signal has reached is named, however late the threads that take notice of signals get to it."""

import signal

from harness import make_plan, make_recipe, mixed_batch


def stop_rank_1(base, folder) -> None:
    """On each rank: a run without lifelines, of which a signal reaches rank 1."""
    from megatron_lpr.errors import Stopped
    from megatron_lpr.platform import leave_layout, megatron
    from megatron_lpr.signals import listening
    from megatron_lpr.training.hooks.hook import Hook

    class Signal(Hook):
        def before_step(self, trainer):
            if ranks.rank == 1:
                signal.raise_signal(signal.SIGTERM)

    with listening("test", resumes=True), megatron() as ranks:
        from megatron_lpr.training.train import Trainer

        train = {"trainable": "routers", "steps": 2, "micro_batch_size": 2}
        recipe = make_recipe(base, mixed_batch(), folder, {"train": train})
        try:
            Trainer(make_plan(recipe, mixed_batch(), world_size=2), [Signal()]).run()
        except Stopped:
            leave_layout()


def test_the_rank_is_named(on_ranks, toy_base, tmp_path):
    on_ranks(stop_rank_1, 2, toy_base, tmp_path)
    assert (tmp_path / "stopped").read_text().startswith("stopped by SIGTERM on rank 1 after step 1 of 2, ")
