"""What the device and the host do in some steps, as a trace."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_lpr.errors import warn
from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.reporting.progress import stamped
from megatron_lpr.training.hooks.hook import EndsAlike, RunningTrainer


class Profile(EndsAlike):
    """Traces the steps `logging.profile_from` to `profile_to` with torch.profiler; only ranks that are asked have it.

    A run that resumes between the two traces the rest. Chrome's chrome://tracing and Perfetto show the files.
    """

    def __init__(self) -> None:
        self._profile: profile | None = None
        self._first = 0

    def before_step(self, trainer: RunningTrainer) -> None:
        logging, step = trainer.recipe.logging, trainer.step + 1
        if self._profile is None and logging.profile_from <= step <= logging.profile_to:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile, self._first = profile(activities=activities), step
            self._profile.start()

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if trainer.step == trainer.recipe.logging.profile_to:
            self.end(trainer)

    def end(self, trainer: RunningTrainer) -> None:
        """Write what has been traced."""
        if self._profile is None:
            return
        traced, self._profile = self._profile, None
        traced.stop()
        name = f"steps_{self._first}_to_{trainer.step}_rank_{dist.get_rank()}.json.gz"
        path = Path(trainer.recipe.output) / "profile" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(path))
        except OSError as error:
            warn(f"no profile: {path} cannot be written ({error.strerror})")
        else:
            print(stamped(f"profile in {path}"), flush=True)
