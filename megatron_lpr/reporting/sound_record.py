"""A line of metrics.jsonl as a record of the shape that it should have, whoever has torn, mixed or edited the file."""

import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, cast

from megatron_lpr.files.json_lines import from_json, printable
from megatron_lpr.reporting.metrics_log import StepMetrics

_LARGEST = 1e100  # no measurement is beyond it, and sums of what is below it are finite
_MOST = 1 << 63  # what is counted is fewer

# a value without what holds no number; None: it holds none. ValueError: it has another shape
Shape = Callable[[Any], Any]


def sound_record(line: bytes, *, layers: bool = True) -> StepMetrics | None:
    """The record of a line as `StepMetrics` declares it; None: the line is no step's record.

    Numbers that are missing (null, NaN, infinity) are left out, and so is what needs them. Of the keys only `step` must
    be there.

    Args:
        layers: whether `router` is wanted, which may be a thousand times as long as the rest, and is not parsed then.
    """
    if layers:
        return _sound(line)
    found = _sound(_without_router(line)) or _sound(line)
    if found:
        found.pop("router", None)
    return found


def has_router(line: bytes) -> bool:
    """Whether a line seems to have statistics of every layer."""
    return b'"router":' in line and b'"router": {}' not in line


def _without_router(line: bytes) -> bytes:
    """As `MetricsLog` writes it, from a mark that no string holds, as quotes are escaped there, to the end of a `load`.

    Where that is not the last one, no JSON is left.
    """
    begin = line.find(b', "router": {"')
    end = line.find(b"]]}}", begin)
    return line if begin < 0 or end < 0 else line[:begin] + line[end + 4 :]


def _sound(line: bytes) -> StepMetrics | None:
    try:
        found = _step_metrics(from_json(line))
    except ValueError:
        return None
    return cast(StepMetrics, found) if found and "step" in found else None


def _number(value: Any) -> float | None:
    if type(value) is not float and type(value) is not int:
        raise ValueError
    return value if -_LARGEST < value < _LARGEST else None  # false of NaN too


def _count(value: Any) -> int:
    if type(value) is float and value.is_integer():  # JSON has one kind of numbers
        value = int(value)
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return printable(value)


def _shape(hint: Any) -> Shape:
    """Of a type as `StepMetrics` uses them."""
    if typing.is_typeddict(hint):
        return _fields(typing.get_type_hints(hint), hint.__required_keys__)
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return _shape(arguments[0])
    if typing.get_origin(hint) is dict:
        return _each_value(_or_none(_shape(arguments[1])))
    if typing.get_origin(hint) is list:
        return _all_items(_or_none(_shape(arguments[0])))
    return {float: _number, int: _count, str: _text}[hint]


def _or_none(shape: Shape) -> Shape:
    return lambda value: None if value is None else shape(value)


def _each_value(shape: Shape) -> Shape:
    def of(value: Any) -> dict[str, Any] | None:
        if not isinstance(value, dict):
            raise ValueError
        found = {printable(key): shape(its) for key, its in value.items()}
        return {key: its for key, its in found.items() if its is not None} or None

    return of


def _all_items(shape: Shape) -> Shape:
    """They are of use together alone: a list of layers with a gap says nothing of the later ones."""

    def of(value: Any) -> list[Any] | None:
        if not isinstance(value, list):
            raise ValueError
        found = [shape(its) for its in value]
        return None if None in found else found or None

    return of


def _fields(hints: Mapping[str, Any], required: typing.AbstractSet[str]) -> Shape:
    shapes = {key: _or_none(_shape(hint)) for key, hint in hints.items()}

    def of(value: Any) -> dict[str, Any] | None:
        if not isinstance(value, dict) or not required <= value.keys():
            raise ValueError
        found = {key: shapes[key](its) for key, its in value.items() if key in shapes}
        found = {key: its for key, its in found.items() if its is not None}
        return found if required <= found.keys() else None

    return of


_step_metrics = _fields(typing.get_type_hints(StepMetrics), {"step"})
