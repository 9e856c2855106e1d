"""Dataclasses from YAML mappings, with every key and type checked."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_lpr.errors import UserError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_KINDS = {
    int: "an integer",
    int | None: "an integer",
    str: "a string",
    str | None: "a string",
    bool: "true or false",
}


def read_record(record: type[T], entry: Any, where: str) -> T:
    """Builds the dataclass `record` from a YAML mapping; `where` begins messages.

    Raises:
        UserError: no mapping, an unknown or missing key, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(record)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    check_keys(entry, fields.keys(), required, where)
    return record(**{name: _value(fields[name].type, value, f"{where}: {name}") for name, value in entry.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    nested = next((of for of in typing.get_args(kind) if isinstance(of, type) and dataclasses.is_dataclass(of)), None)
    if nested is not None:
        return read_record(nested, value, where)
    if kind in (dict[str, str], dict[str, str] | None):
        if not isinstance(value, dict) or not all(isinstance(x, str) for x in (*value, *value.values())):
            raise UserError(f"{where} must be a mapping of strings, not {value!r}")
    elif kind is float:
        return _number(value, where)
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} must be {_KINDS[kind]}, not {value!r}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where} must be text, not {value!r}")  # no file has such a name
    return value


def _number(value: Any, where: str) -> float:
    # YAML 1.1 reads 1e-3 (no point) as a string.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"{where} must be a number, not {value!r}")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise UserError(f"{where} must be a number, not {value!r}") from None


def check_keys(entry: Any, known: Iterable[str], required: Iterable[str], where: str) -> None:
    """Raises UserError where `entry` is no mapping, or has a key that is unknown, or lacks one that is required."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a mapping, not {entry!r}")
    for key in entry:
        if key not in known:
            raise UserError(f"{where} has the unknown key '{key}'{nearest(str(key), known)}")
    for key in sorted(required):
        if key not in entry:
            raise UserError(f"{where} has no '{key}'")
