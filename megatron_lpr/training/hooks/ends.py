"""How a run ended: one line of ends.jsonl for each end that it lived to tell."""

from pathlib import Path

import torch.distributed as dist

from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import JsonLines, utc_now
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer
from megatron_lpr.training.run_files import End, Outcome, newest_start


class Ends(Hook):
    """Rank 0 tells how the run ended; another rank only what it alone knows, as its bug or its lack of memory."""

    def finish(self, trainer: RunningTrainer) -> None:
        if dist.get_rank() == 0:
            _write(trainer, "finished", None)

    def stop(self, trainer: RunningTrainer) -> None:
        if dist.get_rank() == 0:
            _write(trainer, "stopped", None)

    def fail(self, trainer: RunningTrainer, error: BaseException) -> None:
        is_told_by_all = isinstance(error, UserError | SystemExit | KeyboardInterrupt)
        if dist.get_rank() and is_told_by_all:
            return
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        outcome: Outcome = "stopped" if isinstance(error, SystemExit | KeyboardInterrupt) else "failed"
        _write(trainer, outcome, " ".join(reason.removesuffix(": ").split()))


def _write(trainer: RunningTrainer, outcome: Outcome, reason: str | None) -> None:
    folder = Path(trainer.recipe.output)
    start = newest_start(folder, faults=[]).get("time")  # this one: a run has its folder to itself
    lines = JsonLines(folder / "ends.jsonl")
    end = End(time=utc_now(), start=start, rank=dist.get_rank(), step=trainer.step, outcome=outcome, reason=reason)
    lines.append(end, sync=True)
    lines.close()
