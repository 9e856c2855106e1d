"""SIGTERM, SIGUSR1 and Ctrl-C: what asks a command to stop, and what becomes of it.

A command ends at once: `Interrupted` is raised where it is. A run that makes its steps is asked to stop instead
(`stop_at_a_step`), and saves first. A second signal ends both without another word, wherever they are, in a collective
too: a thread reads which signals have come, though the interpreter has not handled them yet. Nothing heavy is imported.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from megatron_lpr.errors import STOPPED, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_GRACE_SECONDS = 5.0  # for a rank that may be in a collective which nobody finishes, to end by itself
_ECHO_SECONDS = 0.3  # `timeout` sends its signal to the process and then to its group
_TORCHRUN_ECHO_SECONDS = 5.0  # Slurm reaches ranks and torchrun, which passes on what it gets; its death is one more
_DYING_SECONDS = 0.3  # its threads die one by one, and the first one's death is told
_PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """A signal ends the command here and now."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signal = signal.Signals(signum)


class Listener:
    """Takes the signals of a command, in the main thread."""

    def __init__(self, name: str, resumes: bool) -> None:
        """resumes: the same command starts it again, and a stop is no failure."""
        self.since = time.monotonic()
        self.asked: signal.Signals | None = None  # the first that came
        # called in a thread of its own, before the process ends; `why` is empty where it has nothing to tell any more
        self.on_ending: Callable[[int, str], None] = lambda status, why: None
        self._name, self._resumes = name, resumes
        self._say: Callable[[], None] | None = None
        self._has_stopped = False
        self._pid, self._parent = os.getpid(), os.getppid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals that somebody else has a use for, or that are ignored, stay as they are."""
        mine = [s for s in SIGNALS if signal.getsignal(s) in (signal.SIG_DFL, signal.default_int_handler)]
        before = {number: signal.signal(number, self._take) for number in mine}
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        if _TORCHRUN in os.environ:
            self._end_with_parent()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            writer.close()  # the thread ends

    def stop_at_a_step(self, say: Callable[[], None]) -> None:
        """From now on a first signal only calls `say`, in the main thread."""
        self._say = say

    def has_stopped(self) -> None:
        """All is saved and said: a second signal ends what is left, and is no failure either."""
        self._has_stopped = True

    @property
    def ended_at_once(self) -> bool:
        """Whether a signal has ended the command, whatever error that has become on its way."""
        return self.asked is not None and self._say is None

    def ending(self) -> tuple[int, str]:
        """Exit status and sentence of a command that a signal, or a KeyboardInterrupt, ends at once."""
        asked = self.asked or signal.SIGINT
        if self._resumes and self.asked:
            return STOPPED, (
                f"{self._name}: stopped by {self.what_asked()} before its first step, so that there is nothing to "
                "save; the same command starts it again"
            )
        return 128 + asked, f"{self._name}: {'interrupted' if asked == signal.SIGINT else f'ended by {asked.name}'}"

    def what_asked(self) -> str:
        """For people."""
        return self._described(self.asked) if self.asked else ""

    def _described(self, signum: int) -> str:
        if _TORCHRUN in os.environ:
            time.sleep(_DYING_SECONDS)
        orphaned = _TORCHRUN in os.environ and os.getppid() != self._parent
        return "the end of torchrun" if orphaned else signal.Signals(signum).name

    def _take(self, signum: int, frame: object) -> None:
        if os.getpid() != self._pid or self.asked:
            return  # a forked process leaves it to its parent; what is not the first is the thread's business
        self.asked = signal.Signals(signum)
        if self._say is None:
            raise Interrupted(signum)
        self._say()

    def _watch(self, reader: socket.socket) -> None:
        came: signal.Signals | None = None
        first = deadline = None
        echo = _TORCHRUN_ECHO_SECONDS if _TORCHRUN in os.environ else _ECHO_SECONDS
        with reader:
            while True:
                wait: float | None = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not select.select([reader], [], [], wait)[0]:
                    deadline = None
                    if self._say is None:
                        self.asked = self.asked or came  # in C, as in a rendezvous, the main thread has not taken it
                        self._end(*self.ending())
                    continue
                received = reader.recv(64)
                if not received:
                    return
                for signum in (byte for byte in received if byte in SIGNALS):
                    now = time.monotonic()
                    if first is None:
                        came, first = signal.Signals(signum), now
                        deadline = now + _GRACE_SECONDS if among_ranks() else None
                    elif now - first > echo and self._has_stopped:
                        self._end(STOPPED, "")
                    elif now - first > echo:
                        name = self._described(signum)
                        self._end(128 + signum, f"{self._name}: ended at once by a second signal, {name}")

    def _end(self, status: int, why: str) -> None:
        self.on_ending(status, why)
        end_process(status, why)

    def _end_with_parent(self) -> None:
        """Under torchrun: SIGTERM when it ends without a word to its ranks, as SIGUSR1 ends it. Linux only."""
        if not sys.platform.startswith("linux"):
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != self._parent:  # it has ended between the two
            os.kill(os.getpid(), signal.SIGTERM)


_listener: Listener | None = None


@contextlib.contextmanager
def listening(name: str, *, resumes: bool = False) -> Iterator[Listener]:
    """Inside it signals ask the command `name` to stop. An outer one stands; outside of the main thread none comes."""
    global _listener
    if _listener:
        yield _listener
        return
    if threading.current_thread() is not threading.main_thread():
        yield Listener(name, resumes)
        return
    _listener = Listener(name, resumes)
    try:
        with _listener.listening():
            yield _listener
    finally:
        _listener = None


@contextlib.contextmanager
def stoppable(name: str) -> Iterator[None]:
    """`listening` for what goes on when it is called again; what ends it at once is told, and Stopped, not Interrupted.

    Where a command listens already, all of that is its own business.
    """
    if _listener:
        yield
        return
    with listening(name, resumes=True) as mine:
        try:
            yield
        except Interrupted:
            print(mine.ending()[1], file=sys.stderr, flush=True)
            raise Stopped from None


def listener() -> Listener:
    """Of the command that this process runs; where there is none, one that hears nothing."""
    return _listener or Listener("", resumes=False)


def end_process(status: int, sentence: str = "") -> None:
    """End here and now, from any thread; what is printed already is kept, if that takes no more than a second."""
    flushing = threading.Thread(target=_flush, args=(sentence,), daemon=True)
    flushing.start()
    flushing.join(1.0)
    os._exit(status)


def _flush(sentence: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if sentence:
        with contextlib.suppress(OSError):
            os.write(2, f"{sentence}\n".encode())


def _in_forked_process() -> None:
    """What the thread of `listening` reads belongs to the parent: a forked process that is ended would end it too.

    SIGTERM ends it, as its parent means when it terminates it (Python does with daemons, and waits for them).
    """
    if _listener:
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) == _listener._take:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_forked_process)


def among_ranks() -> bool:
    """Whether a launcher has started several of this process, as far as its variables tell."""
    told = (os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    return any(number.isdecimal() and int(number) > 1 for number in told)


@contextlib.contextmanager
def not_for_children() -> Iterator[None]:
    """Processes that are started inside never get what stops a command and is sent to all: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
