"""Run a function on several ranks of this machine: processes that know each other through torchrun's variables."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Self


def run_distributed(func: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300.0) -> list[Any]:
    """Run func(*args) in `world_size` new processes and return what each rank returned.

    The processes have RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and one thread each; `func` joins by
    itself (`platform.join(); platform.prepare()`) and leaves. Importing torch and Megatron costs seconds in every
    process: let one call run many cases, or keep the processes (`RankProcesses`).

    Args:
        func: a function at the top of an importable module; args and results must be picklable.

    Raises:
        RuntimeError: a rank failed (holds the traceback of the first), or the time is up; the others are killed.
    """
    deadline = time.monotonic() + timeout_seconds
    with RankProcesses() as ranks:
        results = ranks.run(func, world_size, *args, timeout_seconds=timeout_seconds)
        ranks.end(deadline)
    return results


class RankProcesses:
    """Processes that serve one call after another, as `run_distributed` does; a context manager.

    They are started when a call needs them: one of two ranks runs in the first two of four that are there.
    """

    def __init__(self) -> None:
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def run(self, func: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300.0) -> list[Any]:
        """What func(*args) returns on each of `world_size` ranks. After a RuntimeError the processes are gone."""
        while len(self._processes) < world_size:
            self._start(rank=len(self._processes))
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        payload = pickle.dumps((func, args))
        for pipe in self._pipes[:world_size]:
            with contextlib.suppress(BrokenPipeError):  # it died: said below
                pipe.send((common, payload))
        try:
            return self._collect(self._pipes[:world_size], time.monotonic() + timeout_seconds)
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        process = context.Process(target=_serve, args=(environment, theirs))
        process.start()
        theirs.close()  # so that the end of the process closes the pipe
        self._processes.append(process)
        self._pipes.append(ours)

    def end(self, deadline: float) -> None:
        """Let the processes end by themselves: they may have children of their own to end."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        for process in self._processes:
            if process.exitcode is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _collect(self, pipes: list[Connection], deadline: float) -> list[Any]:
        results = dict[int, Any]()
        while len(results) < len(pipes):
            waiting = [rank for rank in range(len(pipes)) if rank not in results]
            ready = wait([pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"out of time: no result from ranks {waiting} of {len(pipes)}")
            for rank in (rank for rank in waiting if pipes[rank] in ready):
                try:
                    ok, result = pipes[rank].recv()
                except EOFError:
                    self._processes[rank].join()
                    raise RuntimeError(f"rank {rank} of {len(pipes)} died: {self._processes[rank].exitcode}") from None
                if not ok:
                    raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(len(pipes))]


def _serve(environment: dict[str, str], pipe: Connection) -> None:
    os.setpgrp()  # so that it can be killed together with its children, as Megatron's checkpoint writers
    os.environ.update(environment)  # before torch is imported with `func`
    while True:
        try:
            common, payload = pipe.recv()
        except EOFError:
            return
        os.environ.update(common)
        try:
            func, args = pickle.loads(payload)
            outcome = (True, func(*args))
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send(outcome)
        gc.collect()
        gc.freeze()  # what is imported stays: collections in the next call need not look at it


# each process begins elsewhere, and gives none twice: whoever has one may not listen at it yet
_PORTS = itertools.count(random.SystemRandom().randrange(12_000))


def free_port() -> int:
    """A port that nobody listens at, for ranks that take seconds until they do.

    The kernel gives none of these (it begins at 32768) to whoever asks for any port in the meantime.
    """
    while True:
        port = 20_000 + next(_PORTS) % 12_000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
