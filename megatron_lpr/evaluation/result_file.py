"""Reading the JSON of results, which people copy, edit and mix up, as what it should be."""

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.reading import converted, from_tree

T = TypeVar("T")


def read_result(kind: type[T], path: str | Path, writer: str = "megatron-lpr evaluate") -> T:
    """A file as a dataclass, or as another type that a field of one may have.

    Keys of the file that the dataclass does not know, of another version, are left out.

    Args:
        writer: the command that writes such files, for messages.

    Raises:
        UserError: no such file, or it holds something else.
    """
    where = f"evaluation result {path}"
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("no mapping")
        if not dataclasses.is_dataclass(kind):
            return converted(kind, tree, where, "routing")
        known = {field.name for field in dataclasses.fields(kind)}
        return from_tree(kind, {key: value for key, value in tree.items() if key in known and value is not None}, where)
    except OSError as error:
        mend = f"give the JSON file that `{writer}` has written (--out)"
        raise UserError(f"{where}: cannot be read: {error.strerror}; {mend}") from None
    except (ValueError, RecursionError) as error:
        what = str(error).removeprefix(f"{where}: ")
        raise UserError(f"{where}: not written by `{writer}` ({what}); evaluate again") from None
