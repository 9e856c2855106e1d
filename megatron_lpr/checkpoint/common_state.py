"""What is no tensor in a checkpoint: Megatron-Core 0.16 keeps it in common.pt, and fails without; 0.19 keeps it among
the other objects, and reads both."""

import importlib.metadata
from pathlib import Path

from packaging.version import Version

from megatron_lpr.errors import UserError


def refuse_newer(folder: Path) -> None:
    """UserError for a complete checkpoint that the Megatron-Core which is installed is too old to load."""
    try:
        installed = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return  # a source tree says no version
    if not (folder / "common.pt").is_file() and Version(installed).release < (0, 19):
        raise UserError(
            f"checkpoint {folder}: was written by a newer megatron-core than this one ({installed}), "
            "which cannot load it; install megatron-core 0.19"
        )
