"""All tensors of a source to their places in the shards, in this process or in several that share the work."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch

from megatron_lpr.conversion.export.sources import Source
from megatron_lpr.errors import UserError
from megatron_lpr.files.new_folder import hold_folder
from megatron_lpr.files.safetensors_io import ShardedWriter
from megatron_lpr.platform.stopping import not_for_children
from megatron_lpr.reporting.progress import byte_progress


def filling(source: Source, what: str, *, processes: int, progress: bool) -> Callable[[ShardedWriter], None]:
    """A function that writes all of `source` to the writer it is given, with a bar named `what` where asked for."""

    def fill(writer: ShardedWriter) -> None:
        with byte_progress(what, sum(writer.sizes.values()), show=progress) as bar:
            write_all(source, writer, processes=processes, progress=bar.update)

    return fill


def write_all(source: Source, writer: ShardedWriter, *, processes: int, progress: Callable[[int], object]) -> None:
    """Writes every unit of `source`; `progress` gets the bytes of each tensor. With several processes each is new
    (spawned) and has about the same number of bytes to write.

    UserError: what a process ran into, or that it died.
    """
    if processes < 1:
        raise UserError(f"{processes} processes: at least one must write")
    if processes == 1:
        for name, tensor in source.stream(source.units):
            writer.write(name, tensor)
            progress(writer.sizes[name])
        return
    spawn = multiprocessing.get_context("spawn")
    workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
    try:
        for units in _share(source, writer, processes):
            receiver, sender = spawn.Pipe(duplex=False)
            arguments = (source, writer, units, sender, os.getpid())
            worker = spawn.Process(target=_write_units, args=arguments, daemon=True)
            with not_for_children():
                worker.start()
            sender.close()
            workers[receiver] = worker
        open_ends = list(workers)
        while open_ends:
            for receiver in wait(open_ends):
                if not _receive(receiver, workers[receiver], writer, progress):
                    open_ends.remove(receiver)
    finally:
        for receiver, worker in workers.items():
            receiver.close()
            worker.terminate()
            worker.join()


def _share(source: Source, writer: ShardedWriter, processes: int) -> list[list[str]]:
    """The units in as many runs of about the same bytes: each process writes one region of the model."""
    sizes = {unit: sum(writer.sizes[name] for name in names) for unit, names in source.units.items()}
    shares: list[list[str]] = [[] for _ in range(processes)]
    total, done = max(sum(sizes.values()), 1), 0
    for unit, size in sizes.items():
        shares[min(done * processes // total, processes - 1)].append(unit)
        done += size
    return [share for share in shares if share]


def _write_units(source: Source, writer: ShardedWriter, units: list[str], sender: Connection, parent: int) -> None:
    torch.set_num_threads(1)
    try:
        with hold_folder(writer.folder, parent):
            for name, tensor in source.stream(units):
                writer.write(name, tensor)
                sender.send(name)
    except BrokenPipeError:
        return  # the process that asked for it is gone
    except Exception as error:
        sender.send(error)


def _receive(
    receiver: Connection,
    worker: multiprocessing.process.BaseProcess,
    writer: ShardedWriter,
    progress: Callable[[int], object],
) -> bool:
    """Takes one message; False when there will be no more."""
    try:
        message = receiver.recv()
    except EOFError:
        worker.join()
        if worker.exitcode:
            raise UserError(f"a process that wrote the export died (exit code {worker.exitcode})") from None
        return False
    if isinstance(message, Exception):
        raise message
    writer.mark_written(message)
    progress(writer.sizes[message])
    return True
