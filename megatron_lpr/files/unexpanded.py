"""Paths that a shell would have read otherwise: none reads a recipe, or what stands behind `=`."""

import os
import re
from pathlib import Path

from megatron_lpr.errors import UserError


def refuse_unexpanded(path: str | Path) -> None:
    """UserError for a path with ~, $SCRATCH or s3: that is not there by that very name, to be read or to be made."""
    if os.path.lexists(path):
        return
    if str(path).startswith("~"):
        raise UserError(f"'{path}': ~ is the home folder for a shell, which has not read it here: write the whole path")
    if re.search(r"\$[{\w]|^\w+:/", str(path)):  # a Path has one / less
        raise UserError(f"'{path}': neither variables of a shell nor addresses are read here: write the whole path")
