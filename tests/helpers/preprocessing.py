"""Preprocessing with its settings as keywords, and whether its processes have ended."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.preprocess import preprocess as module
from megatron_lpr.recipe.text_settings import PreprocessConfig, SourceConfig


def preprocess(sources: Iterable[SourceConfig], *, overwrite: bool = False, **settings: Any) -> Manifest:
    """`settings` are those of a recipe's section `preprocess`."""
    return module.preprocess(PreprocessConfig(corpora=tuple(sources), **settings), overwrite=overwrite)


def run(text: str, tokenizer: str, output: Path, **settings: Any) -> Manifest:
    """The corpus `hu` of one file."""
    source = SourceConfig(name="hu", files=(text,), language="hu", role="expanded")
    return preprocess([source], tokenizer=tokenizer, output=str(output), **settings)


def files(folder: Path) -> dict[str, bytes]:
    """What preprocessing left in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def left_of(processes: Iterable[psutil.Process], seconds: float = 60) -> list[psutil.Process]:
    """Those that go on, after a while. A zombie has ended: the first process of a container may reap no orphans."""
    deadline, left = time.monotonic() + seconds, list(processes)
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [process for process in left if goes_on(process)]
    return left


def goes_on(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
