"""Run a function on several ranks of this machine: processes that know each other through torchrun's variables."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def run_distributed(func: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300.0) -> list[Any]:
    """Run func(*args) in `world_size` new processes and return what each rank returned.

    The processes have RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and one thread each; `func` joins by
    itself (`platform.join(); platform.prepare()`) and leaves. Importing torch and Megatron costs seconds in every
    process: let one call run many cases.

    Args:
        func: a function at the top of an importable module; args and results must be picklable.

    Raises:
        RuntimeError: a rank failed (holds the traceback of the first), or the time is up; the others are killed.
    """
    context = multiprocessing.get_context("spawn")
    payload = pickle.dumps((func, args))
    common = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "OMP_NUM_THREADS": 1}
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        environment = {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        process = context.Process(target=_run_rank, args=(environment, payload, sender))
        process.start()
        sender.close()  # so that the end of the process closes the pipe
        processes.append(process)
        pipes.append(receiver)
    deadline = time.monotonic() + timeout_seconds
    try:
        results = _collect(pipes, processes, deadline)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))  # they may have children of their own to end
        return results
    finally:
        for process in processes:
            if process.exitcode is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()


def _run_rank(environment: dict[str, str], payload: bytes, sender: Connection) -> None:
    os.setpgrp()  # so that it can be killed together with its children, as Megatron's checkpoint writers
    os.environ.update(environment)  # before torch is imported with `func`
    try:
        func, args = pickle.loads(payload)
        outcome = (True, func(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    sender.send(outcome)


def _collect(pipes: list[Connection], processes: list, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [rank for rank in range(len(pipes)) if rank not in results]
        ready = wait([pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"out of time: no result from ranks {waiting} of {len(pipes)}")
        for rank in (rank for rank in waiting if pipes[rank] in ready):
            try:
                ok, result = pipes[rank].recv()
            except EOFError:
                processes[rank].join()
                raise RuntimeError(f"rank {rank} of {len(pipes)} died: {processes[rank].exitcode}") from None
            if not ok:
                raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
