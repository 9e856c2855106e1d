"""How a setting is declared: its default, the sentence that `--help` shows, and the numbers that it takes."""

import dataclasses
import math
import numbers
from dataclasses import dataclass, field
from typing import Any

from megatron_lpr.errors import UserError

LARGEST_INT = (1 << 63) - 1  # of a whole number without another upper bound: what C++, torch and files hold
LARGEST_FLOAT = 1e30  # of any other number: float32 holds more, but not what an optimizer makes of it
MOST_SAMPLES = 1 << 62  # of a run, in csrc/schedule.h
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting takes; of a list or a mapping, that each of its values is."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (isinstance(number, numbers.Integral) or math.isfinite(number))
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = [(name.replace("_", " "), bound) for name, bound in vars(self).items() if bound is not None]
        return ", ".join(f"{name} {_short(bound)}" for name, bound in bounds) or "any finite number"


def opt(
    default: Any,
    doc: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with a default, the sentence that `--help` shows for it, and the range of its numbers."""
    valid = Range(at_least=at_least, above=above, at_most=at_most, below=below)
    metadata = {"doc": doc, "range": valid}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(
    doc: str, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None
) -> Any:
    """A field that the recipe must set."""
    return field(metadata={"doc": doc, "range": Range(at_least=at_least, above=above, at_most=at_most)})


def range_of(f: dataclasses.Field, whole: bool) -> Range:
    """The numbers that a field takes, with the bound that all `whole` ones have, or all others."""
    valid: Range = f.metadata["range"]
    if valid.at_most is None and valid.below is None:
        return dataclasses.replace(valid, at_most=LARGEST_INT if whole else LARGEST_FLOAT)
    return valid


def parse_size(size: str, name: str) -> int:
    """Bytes of '500MB' or '4GB' (decimal units, as Hugging Face counts).

    Raises:
        UserError: no number above 0, with or without a unit; begins with `name`, the setting's.
    """
    unit = size[-2:].upper()
    number, factor = (size[:-2], _UNITS[unit]) if unit in _UNITS else (size, 1)
    try:
        found = int(float(number) * factor)
    except (ValueError, OverflowError):
        found = 0
    if not 0 < found <= LARGEST_INT:
        raise UserError(f"{name}: '{size}' is no size; write it as 500MB or 4GB")
    return found


def _short(bound: float) -> str:
    """A bound as people write it: 2^31 rather than 2147483648."""
    for add, sign in ((0, ""), (1, " - 1")):
        power = int(bound) + add
        if bound == int(bound) >= 1 << 20 and power & (power - 1) == 0:
            return f"2^{power.bit_length() - 1}{sign}"
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
