"""The settings of the machines and the job that a run lives in; none of them changes what it learns."""

from dataclasses import dataclass

from megatron_lpr.recipe.fields import opt


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Limits of time: of the job, of a start-up, of a step, of a collective."""

    margin_minutes: float = opt(
        5.0, "minutes before the time limit of its Slurm job at which a run saves and stops", at_least=0
    )
    startup_minutes: float = opt(
        60.0,
        "minutes that the start-up may take, and so may a save and whatever else is no step; 0: no limit",
        at_least=0,
    )
    watchdog: float = opt(
        20.0, "times the median of the last steps that a step may take before all ranks end; 0: no limit", at_least=0
    )
    watchdog_floor_seconds: float = opt(300.0, "seconds that a step may take in any case", above=0)
    collective_timeout_minutes: float = opt(
        30.0, "minutes that a collective waits for a rank that is alive but does not come", above=0, at_most=10**6
    )
