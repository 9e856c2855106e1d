"""How a command ends that is stopped from outside: one sentence and the exit status that shells know.

It imports nothing heavy: it must be in place before what takes seconds to import.
"""

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable

from megatron_lpr.commands.standard_streams import LossyStream, drop, lossy_streams
from megatron_lpr.errors import STOPPED, Stopped
from megatron_lpr.signals import among_ranks, end_process, listening

NOBODY_READS = 128 + signal.SIGPIPE


def status_of(name: str, command: Callable[[], int], *, resumes: bool = False, ends: bool = False) -> int:
    """The exit status of `command`, also where a signal stops it or nobody reads what it prints any more.

    A rank that ends among others ends at once where its status is not 0: the end of Python would wait for collectives
    that nobody finishes, and a launcher that sees one rank go first ends the others.

    Args:
        resumes: started again it goes on, so that to be stopped is no failure (75); what it prints is told in its files
            too, so that neither is to lose some of it.
        ends: the process ends with it. That takes Python a second, in which one more signal would be the exit status of
            a run that has stopped (75), so that it ends at once.
    """
    with listening(name, resumes=resumes) as listener, lossy_streams() as (stdout, _):
        try:
            status = command()
            stdout.flush()
            return status if resumes else status or _lost(name, stdout)
        except Stopped:
            if among_ranks() or ends:
                end_process(STOPPED)
            return STOPPED
        except (KeyboardInterrupt, Exception) as error:
            # libraries that are being imported may turn the one into the other
            if listener.ended_at_once or isinstance(error, KeyboardInterrupt):
                return _at_once(*listener.ending(), leaving=ends and resumes)
            if isinstance(error, BrokenPipeError):
                return _nobody_reads(name)
            if _in_process_group() and among_ranks():
                traceback.print_exc()
                end_process(1)
            raise


def _at_once(status: int, sentence: str, leaving: bool) -> int:
    if leaving or _in_process_group() or among_ranks():
        end_process(status, sentence)
    print(sentence, file=sys.stderr, flush=True)
    return status


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _lost(name: str, stdout: LossyStream) -> int:
    if stdout.error is None:
        return 0
    print(f"{name}: what it prints could not be written: {stdout.error.strerror}", file=sys.stderr, flush=True)
    return 1


def _nobody_reads(name: str) -> int:
    drop(sys.stdout)
    with contextlib.suppress(BrokenPipeError):
        print(f"{name}: stopped, for nobody reads what it prints", file=sys.stderr, flush=True)
    return NOBODY_READS
