"""The output folder of a run while it runs: locked, tidied, and with one line of checkpoints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_lpr.checkpoint.folders import clear_leavings, set_future_aside
from megatron_lpr.checkpoint.run_state import find_checkpoint, step_of
from megatron_lpr.errors import UserError
from megatron_lpr.files.locks import run_lock
from megatron_lpr.platform import Ranks, together


@contextlib.contextmanager
def run_folder(output: str, resume: Path | None) -> Iterator[None]:
    """The folder is this run's inside it: rank 0 holds it for all ranks, and puts it in order first.

    Args:
        resume: the checkpoint that the run was planned to go on from; None: there was none.

    Raises:
        UserError: another run holds the folder, or has changed it since the run was planned.
    """
    with contextlib.ExitStack() as held:
        is_first = Ranks.from_environment().rank == 0
        together(lambda: _take(held, output, resume) if is_first else None)
        yield


def _take(held: contextlib.ExitStack, output: str, resume: Path | None) -> None:
    held.enter_context(run_lock(output))
    found = find_checkpoint(output)
    if (found and found.folder) != resume:
        raise UserError(f"output: another run has just written to {output}; start this one again")
    root = Path(output) / "checkpoints"
    if leavings := clear_leavings(root):
        print(f"deleted {', '.join(leavings)} in {root}, which a killed run has left", flush=True)
    if resume and (sentence := set_future_aside(root, step_of(resume))):
        print(sentence, flush=True)
