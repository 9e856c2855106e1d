"""Output folders that are either complete or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lpr.errors import UserError

# What belongs to a model besides weights and config; copied byte for byte, because transformers 5 saves a
# tokenizer in a form that 4.x and vLLM cannot read.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def check_vacant(out_dir: str | Path) -> None:
    """UserError when `out_dir` exists and is anything but an empty folder."""
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"output folder '{out_dir}' exists and is not empty: choose another or remove it")


@contextmanager
def complete_folder(out_dir: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `out_dir` when the block ends well, and vanishes when it does not.

    UserError, before anything is done, when `out_dir` exists and is not empty.
    """
    check_vacant(out_dir)
    out = Path(out_dir).absolute()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.incomplete")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot create '{temporary}': {error.strerror}") from error
    try:
        yield temporary
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copy_companions(base_dir: str | Path, out_dir: Path) -> list[str]:
    """Copies tokenizer and generation files byte for byte; returns the names of those that were there."""
    names = [name for name in COMPANION_FILES if (Path(base_dir) / name).is_file()]
    for name in names:
        shutil.copyfile(Path(base_dir) / name, out_dir / name)
    return names
