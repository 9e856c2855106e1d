"""One rank's share of a checkpoint: planned by Megatron, held on the host, written with checksums.

Who writes what is Megatron's plan, and the files are those that it reads (torch_dist: __<rank>_<i>.distcp). Written
they are by threads of this process: Megatron's own way forks helpers that outlive a rank that is killed.
"""

import atexit
import heapq
import io
import os
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_lpr.checkpoint.completion import Written, leave_share
from megatron_lpr.files import durable
from megatron_lpr.files.checksum import ChecksummedFile

_FILES = 2  # of a rank, each with a thread

Values = torch.Tensor | io.BytesIO


def planner() -> MCoreSavePlanner:
    """Megatron's, as its own strategy calls it: every rank plans for itself, on entries that are there once."""
    return MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)


class PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the moment at which it would write.

    Attributes:
        plan: what this rank writes; `values` holds it, in the same order.
    """

    plan: SavePlan
    values: list[Values]

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Called by `dist_checkpointing.save`, on all ranks."""
        entries, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        mine = planner()
        mine.set_up_planner(mcore_to_pyt_state_dict(entries, False), is_coordinator=dist.get_rank() == 0)
        self.plan = mine.finish_plan(mine.create_local_plan())
        self.values = [mine.resolve_data(item) for item in self.plan.items]


def structure(content: dict[str, Any]) -> list[Any]:
    """What a rank has of a checkpoint, without the values: where it is the same, so is who writes what."""
    entries = (entry for entry in nested_values(content) if isinstance(entry, ShardedBase))
    return [
        (
            entry.key,
            getattr(entry, "global_offset", None),
            getattr(entry, "local_shape", None),
            getattr(entry, "dtype", None),
            entry.replica_id,
        )
        for entry in entries
    ]


class HostBuffers:
    """Host memory that a save copies tensors to, and the next one again: pinned where there is a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, plan: SavePlan, values: Sequence[Values]) -> list[Values]:
        """The values on the host, or on their way: `wait` before they are read. Training may go on at once."""
        kept, self._buffers = self._buffers, {}
        taken = [self._copy(item.index, value, kept) for item, value in zip(plan.items, values, strict=True)]
        if torch.cuda.is_available():
            self._copied = torch.cuda.Event()
            self._copied.record()
        return taken

    def wait(self) -> None:
        """Until everything that was taken is here; for the thread that writes."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, index: MetadataIndex, value: Values, kept: dict[MetadataIndex, torch.Tensor]) -> Values:
        if isinstance(value, io.BytesIO):
            return value
        buffer = kept.get(index)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        self._buffers[index] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)


class _Abandoned(Exception):
    """Nobody waits for the share any more."""


class ShareWriter:
    """Threads that write a share into a folder, and end with the process."""

    def __init__(
        self,
        folder: Path,
        plan: SavePlan,
        values: Sequence[Values],
        small_files: dict[str, bytes],
        note: dict[str, Any],
    ) -> None:
        """small_files: by name, written before the rest. note: left beside the share when it is written."""
        self._plan, self._note = plan, note
        self._is_abandoned = False
        self._folder, self._small, self._written, self._lock = folder, small_files, Written(), threading.Lock()
        shares = _divided(list(zip(plan.items, values, strict=True)))
        self._left = len(shares)  # that are not written
        self._threads = [
            threading.Thread(target=self._work, args=(number, share), name="checkpoint", daemon=True)
            for number, share in enumerate(shares)
        ]

    def start(self, buffers: HostBuffers | None = None) -> None:
        """buffers: those that the values are on their way to."""
        self._buffers = buffers
        atexit.register(self._abandon)  # or the end of Python would come over a thread inside torch
        for thread in self._threads:
            thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether every thread has written its part, or failed to."""
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def has_failed(self) -> bool:
        """Whether a thread has failed."""
        return bool(self._written.faults)

    def wait(self) -> Written:
        """What has become of it, when all threads have ended."""
        for thread in self._threads:
            thread.join()
        atexit.unregister(self._abandon)
        return self._written

    def _abandon(self) -> None:
        self._is_abandoned = True
        self.wait()

    def _work(self, number: int, share: list[tuple[WriteItem, Values]]) -> None:
        try:
            if self._buffers:
                self._buffers.wait()
            for name, content in self._small.items() if number == 0 else ():
                self._write(name, [content])
            if share:
                self._write(f"__{dist.get_rank()}_{number}.distcp", share)
            durable.sync(self._folder)
            with self._lock:
                self._left -= 1
                is_last = not self._left
            if is_last:
                leave_share(self._folder, dist.get_rank(), self._plan, self._written, self._note)
        except _Abandoned:
            self._fail("it was abandoned")
        except OSError as error:
            self._fail(f"{os.path.basename(error.filename or '') or 'a file'} cannot be written: {error.strerror}")
        except Exception as error:
            traceback.print_exc()
            self._fail(f"a thread that writes has ended ({type(error).__name__}: {error})")

    def _fail(self, fault: str) -> None:
        with self._lock:
            self._written.faults.append(fault)

    def _write(self, name: str, share: Sequence[Any]) -> None:
        results, file = [], None
        try:
            with ChecksummedFile(self._folder / name) as file:
                for entry in share:
                    if self._is_abandoned:
                        raise _Abandoned
                    if isinstance(entry, bytes):
                        file.write(entry)
                    else:
                        results.append(_write_item(file, name, *entry))
        except (OSError, RuntimeError) as failure:
            # torch makes a RuntimeError of it, with the stack of its C++
            error = (file and file.error) or failure
            if not isinstance(error, OSError):
                raise
            raise OSError(error.errno, error.strerror, name) from None
        with self._lock:
            self._written.results += results
            self._written.checksums[name] = file.checksum


def _write_item(file: ChecksummedFile, name: str, item: WriteItem, value: Values) -> WriteResult:
    """In the form in which torch's FileSystemReader reads it."""
    start = file.tell()
    if isinstance(value, io.BytesIO):
        file.write(value.getbuffer())
    else:
        value = value.detach().cpu()
        is_part = value.untyped_storage().nbytes() != value.nbytes  # torch.save would write the whole storage
        torch.save(value.clone() if is_part else value, cast(IO[bytes], file))
    length = file.tell() - start
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, start, length))


def _divided(entries: list[tuple[WriteItem, Values]]) -> list[list[tuple[WriteItem, Values]]]:
    """The entries in `_FILES` parts of about the same size, in the same order every time; no part is empty, but the
    first may be."""
    parts: list[list[tuple[WriteItem, Values]]] = [[] for _ in range(_FILES)]
    sizes = [(0, number) for number in range(_FILES)]
    for entry in sorted(entries, key=lambda entry: -_bytes(entry[1])):
        size, number = heapq.heappop(sizes)
        parts[number].append(entry)
        heapq.heappush(sizes, (size + _bytes(entry[1]), number))
    return [part for number, part in enumerate(parts) if part or not number]


def _bytes(value: Values) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else value.getbuffer().nbytes
