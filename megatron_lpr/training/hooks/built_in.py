"""The hooks that every run has, in the order in which they are called."""

import torch.distributed as dist

from megatron_lpr.training.hooks.announcement import Announcement, Starts
from megatron_lpr.training.hooks.checkpoints import Checkpoints
from megatron_lpr.training.hooks.ends import Ends
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer
from megatron_lpr.training.hooks.metrics import Metrics
from megatron_lpr.training.hooks.plots import Plots
from megatron_lpr.training.hooks.profile import Profile
from megatron_lpr.training.hooks.stopping import Stopping
from megatron_lpr.training.hooks.stragglers import Stragglers
from megatron_lpr.training.hooks.watching import Watching
from megatron_lpr.training.hooks.weights_and_biases import WeightsAndBiases


def built_in(trainer: RunningTrainer) -> list[Hook]:
    """What every run does, before the hooks that are its own."""
    # they import Megatron, which a script that imports hooks may not have made ready yet
    from megatron_lpr.training.hooks.frozen_weights import FrozenWeights
    from megatron_lpr.training.hooks.replicas import Replicas
    from megatron_lpr.training.hooks.validation import Validation

    logging, rank = trainer.recipe.logging, dist.get_rank()
    profile = [Profile()] if logging.profile_from and rank in logging.profile_ranks else []
    wandb = [WeightsAndBiases()] if logging.wandb != "off" and rank == 0 else []
    stragglers = [Stragglers()] if logging.stragglers_every else []
    validation = [Validation()] if trainer.recipe.evaluation.every else []
    plots = [Plots()] if rank == 0 else []
    return [
        Watching(),  # what the others do after a step is no part of it
        FrozenWeights(trainer.chunks),
        Announcement(),
        Starts(),
        *profile,
        *stragglers,
        *validation,  # before what writes down the metrics
        Metrics(),
        *wandb,
        Replicas(),
        Checkpoints(),
        *plots,
        Ends(),
        Stopping(),
    ]
