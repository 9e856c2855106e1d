"""The weight files of a base model by their SHA-256: what names it in a checkpoint that holds what the base does not.

Hashing reads every byte. So the ranks share the files, in threads that need no one's time, and what was found is kept
in the output folder beside path, size and time of the file: the next start reads none that has stayed the same.
"""

import contextlib
import json
import re
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lpr.errors import UserError
from megatron_lpr.files import durable
from megatron_lpr.files.cores import usable_cores
from megatron_lpr.files.digest import file_sha256
from megatron_lpr.files.safetensors_io import SafetensorsReader

Files = dict[str, dict[str, Any]]  # name -> its `bytes` and `sha256`
MEMORY = "base_files.json"
_MOST_THREADS = 4  # of a process that is alone


class BaseFiles:
    """The files of a base, which are being hashed."""

    def __init__(self, folder: str | Path, *memories: Path) -> None:
        """Starts this rank's part.

        Args:
            memories: folders that may know digests; where there is one, rank 0 keeps them in the first.
        """
        self._folder, self._memories = Path(folder), [memory for memory in memories if memory.is_dir()]
        self._rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._all: Files | None = None
        self._own: dict[str, list[Any]] = {}  # path -> size, time, digest
        self._error: str | None = None
        remembered, waiting = _remembered(self._memories), deque[Path]()
        for path in _share([self._folder / name for name in sizes(folder)], self._rank, world_size):
            known = remembered.get(str(path.resolve()), [])
            if known[:2] == _stamp(path):
                self._own[path.name] = known
            else:
                waiting.append(path)
        threads = 1 if world_size > 1 else min(_MOST_THREADS, len(waiting), usable_cores())
        # daemons: a process that ends does not wait for them
        self._threads = [threading.Thread(target=self._hash, args=(waiting,), daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def digests(self) -> Files:
        """Of all files, waiting for what is missing; collective the first time.

        Raises:
            UserError: on all ranks, where one of them cannot read a file.
        """
        if self._all is None:
            for thread in self._threads:
                thread.join()
            found = [(self._own, self._error)]
            if dist.is_initialized():
                found = [found[0]] * dist.get_world_size()
                dist.all_gather_object(found, (self._own, self._error))
            if error := next((error for _, error in found if error), None):
                raise UserError(error)
            together = {name: entry for own, _ in found for name, entry in own.items()}
            if self._rank == 0 and self._memories:
                self._keep(together)
            self._all = {name: {"bytes": together[name][0], "sha256": together[name][2]} for name in sorted(together)}
        return self._all

    def _hash(self, waiting: deque[Path]) -> None:
        with contextlib.suppress(IndexError):  # nothing is waiting any more
            while path := waiting.popleft():
                try:
                    self._own[path.name] = [*_stamp(path), file_sha256(path)]
                except (UserError, OSError) as error:
                    self._error = str(error)

    def _keep(self, found: dict[str, list[Any]]) -> None:
        memory = self._memories[0]
        new = {str((self._folder / name).resolve()): entry for name, entry in found.items()}
        known = _remembered([memory])
        if any(known.get(path) != entry for path, entry in new.items()):
            with contextlib.suppress(OSError):  # a folder that may be read only
                durable.write_text(memory / MEMORY, json.dumps(known | new, indent=1))


def sizes(folder: str | Path) -> dict[str, int]:
    """The bytes of each weight file of a base. UserError where there are none, or one cannot be read."""
    try:
        return {name: (Path(folder) / name).stat().st_size for name in sorted(SafetensorsReader(folder).files())}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def check_base_sizes(folder: str | Path, recorded: Mapping[str, Any], checkpoint: Path) -> Files:
    """The files that `checkpoint` was written over, all of which `folder` has, in their sizes.

    Args:
        recorded: the base that the checkpoint's run.json names.

    Raises:
        UserError: it is another base.
    """
    files: Files = recorded.get("files") or {}
    if not files:
        raise _another(folder, checkpoint, "its run.json does not name the files")
    here = sizes(folder)
    for name, entry in files.items():
        if name not in here:
            raise _another(folder, checkpoint, f"there is no {name}")
        if here[name] != entry["bytes"]:
            raise _another(folder, checkpoint, f"{name} has {here[name]:,} bytes, not {entry['bytes']:,}")
    return files


def check_base_files(folder: str | Path, recorded: Mapping[str, Any], checkpoint: Path, *memories: Path) -> None:
    """As `check_base_sizes`, and every byte of the files; collective, where there are ranks."""
    files = check_base_sizes(folder, recorded, checkpoint)
    digests = BaseFiles(folder, *memories).digests()
    for name, entry in files.items():
        if digests[name]["sha256"] != entry["sha256"]:
            found = f"{name} has the SHA-256 {digests[name]['sha256'][:12]}, not {entry['sha256'][:12]}"
            raise _another(folder, checkpoint, found)


def run_folder_of(checkpoint: Path) -> Path:
    """The output folder of the run that a checkpoint lies in; of one that has been taken out, its own."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def _another(folder: str | Path, checkpoint: Path, what: str) -> UserError:
    return UserError(
        f"model.base: {folder} is not the base that the checkpoint {checkpoint} was written over ({what}); name the "
        "folder that holds those very files (model.base, --base)"
    )


def _share(paths: list[Path], rank: int, world_size: int) -> list[Path]:
    """This rank's part of the files; all ranks have about as many bytes, whatever each of them remembers."""
    load = [0] * world_size
    own = []
    for path in sorted(paths, key=lambda path: (-path.stat().st_size, path.name)):
        least = min(range(world_size), key=load.__getitem__)
        load[least] += path.stat().st_size
        if least == rank:
            own.append(path)
    return own


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _remembered(memories: list[Path]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for memory in memories:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            tree = json.loads((memory / MEMORY).read_text(encoding="utf-8"))
            if isinstance(tree, dict):
                found |= {path: entry for path, entry in tree.items() if _is_known(entry)}
    return found


def _is_known(entry: Any) -> bool:
    """A size, a time and a digest."""
    return isinstance(entry, list) and len(entry) == 3 and bool(re.fullmatch("[0-9a-f]{64}", str(entry[2])))
