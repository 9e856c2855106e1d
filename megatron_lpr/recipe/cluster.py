"""The settings of the machines and the job that a run lives in; none of them changes what it learns."""

from dataclasses import dataclass

from megatron_lpr.recipe.fields import opt


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Limits of time: of the job, of a start-up, of a step, of a collective."""

    margin_minutes: float = opt(
        5.0, "minutes before the time limit of its Slurm job at which a run saves and stops", at_least=0
    )
    collective_timeout_minutes: float = opt(
        30.0, "minutes that a collective waits for a rank that is alive but does not come", above=0
    )
