"""The hooks that every run has, in the order in which they are called."""

import torch.distributed as dist

from megatron_lpr.training.hooks.announcement import Announcement, Starts
from megatron_lpr.training.hooks.checkpoints import Checkpoints
from megatron_lpr.training.hooks.ends import Ends
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer
from megatron_lpr.training.hooks.metrics import Metrics
from megatron_lpr.training.hooks.plots import Plots
from megatron_lpr.training.hooks.stopping import Stopping
from megatron_lpr.training.hooks.stragglers import Stragglers
from megatron_lpr.training.hooks.watching import Watching


def built_in(trainer: RunningTrainer) -> list[Hook]:
    """What every run does, before the hooks that are its own."""
    # they import Megatron, which a script that imports hooks may not have made ready yet
    from megatron_lpr.training.hooks.frozen_weights import FrozenWeights
    from megatron_lpr.training.hooks.replicas import Replicas

    stragglers = [Stragglers()] if trainer.recipe.logging.stragglers_every else []
    plots = [Plots()] if dist.get_rank() == 0 else []
    return [
        Watching(),  # what the others do after a step is no part of it
        FrozenWeights(trainer.chunks),
        Announcement(),
        Starts(),
        *stragglers,
        Metrics(),
        Replicas(),
        Checkpoints(),
        *plots,
        Ends(),
        Stopping(),
    ]
