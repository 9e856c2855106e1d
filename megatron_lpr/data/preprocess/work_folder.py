"""The folder of a corpus that is being made, `<prefix>.parts`: outlives a kill, goes when the corpus is there."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any


def work_folder(prefix: str) -> str:
    return f"{prefix}.parts"


@contextlib.contextmanager
def open_work_folder(prefix: str, identity: dict[str, Any], block_bytes: int) -> Iterator[tuple[str, int]]:
    """(folder, block_bytes) of the earlier run whose `identity` is the same, or a new folder.

    Parts of an earlier run are of use only if blocks are cut alike, so its block_bytes hold. The folder is left behind
    where the work fails, and removed where it holds no documents. Who opens it has the corpus' lock.
    """
    folder = work_folder(prefix)
    os.makedirs(folder, exist_ok=True)
    record = os.path.join(folder, "job.json")
    earlier = _read(record)
    if earlier is not None and earlier.get("identity") == identity:
        block_bytes = earlier["block_bytes"]
    else:
        if earlier is not None:
            print(f"{folder}: made from something else; its parts are removed", file=sys.stderr)
        _empty(folder)
        with open(f"{record}.partial", "w", encoding="utf-8") as file:
            json.dump({"identity": identity, "block_bytes": block_bytes}, file)
        os.replace(f"{record}.partial", record)
    try:
        yield folder, block_bytes
    finally:
        if not any(entry.name.endswith(".part") and entry.stat().st_size for entry in os.scandir(folder)):
            shutil.rmtree(folder)


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    known = isinstance(content, dict) and isinstance(content.get("block_bytes"), int) and content["block_bytes"] > 0
    return content if known else None


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
