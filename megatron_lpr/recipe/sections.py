"""What can be wrong with the settings alone, whatever the model, the data and the ranks are."""

import dataclasses
import numbers
from collections.abc import Iterator, Mapping
from functools import singledispatch
from typing import Any

from megatron_lpr.errors import UserError, nearest
from megatron_lpr.recipe.fields import MOST_SAMPLES, parse_size, range_of
from megatron_lpr.recipe.settings import DataConfig, ExportConfig, OptimizerConfig, ScheduleEntry, TrainConfig

_ROLES = ("expanded", "original")


def check_section(section: Any, name: str = "") -> None:
    """Check a recipe, or one of its sections: every number against its range, then settings against each other.

    Args:
        name: of the section in the recipe, as optimizer; none for the recipe itself.

    Raises:
        UserError: begins with the dotted name of the setting.
    """
    for f in dataclasses.fields(section):
        for where, value in _each(f"{name}.{f.name}" if name else f.name, getattr(section, f.name)):
            _check_value(f, value, where)
    _check(section, name)


def check_setting(section: type, setting: str, value: Any, where: str) -> None:
    """Check a value that no recipe holds against the range of a setting; `where` names it in the message."""
    (field,) = (f for f in dataclasses.fields(section) if f.name == setting)
    for name, one in _each(where, value):
        _check_value(field, one, name)


def _each(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of a setting with their names: those of a list or a mapping, or the value itself."""
    if isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield f"{where}[{index}]", item
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{where}.{key}", item
    else:
        yield where, value


def _check_value(field: dataclasses.Field, value: Any, where: str) -> None:
    if dataclasses.is_dataclass(value):
        check_section(value, where)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or "range" not in field.metadata:
        return
    stated, valid = field.metadata["range"], range_of(field, whole=isinstance(value, numbers.Integral))
    if value not in valid:
        raise UserError(f"{where}: {value}; {valid if value in stated else stated}")


@singledispatch
def _check(section: Any, where: str) -> None:
    """The settings of a section against each other; most have nothing to contradict."""


@_check.register
def _(data: DataConfig, where: str) -> None:
    _check_shares(data.mixture, f"{where}.mixture")
    reached = 0
    for number, entry in enumerate(data.schedule):
        if number == 0 and entry.from_sample == 0:
            if entry.mixture is not None:
                raise UserError(
                    f"{where}.schedule[0].mixture: the mixture from sample 0 on is data.mixture; set it there"
                )
        elif entry.from_sample <= reached:
            raise UserError(
                f"{where}.schedule[{number}].from_sample: {entry.from_sample} does not come after {reached}; list the "
                "mixtures in the order in which they take over"
            )
        reached = entry.from_sample


@_check.register
def _(entry: ScheduleEntry, where: str) -> None:
    if entry.mixture is not None:
        _check_shares(entry.mixture, f"{where}.mixture")


def _check_shares(mixture: Mapping[str, float], where: str) -> None:
    for role in mixture:
        if role not in _ROLES:
            raise UserError(f"{where}: unknown role '{role}'{nearest(role, _ROLES)}")
    if not any(mixture.values()):
        raise UserError(f"{where}: asks for no data; give at least one role a share above 0")


@_check.register
def _(train: TrainConfig, where: str) -> None:
    if train.steps * train.global_batch_size > MOST_SAMPLES:
        raise UserError(
            f"{where}.steps: {train.steps} x global_batch_size {train.global_batch_size} are more than 2^62 samples; "
            "lower one of them"
        )


@_check.register
def _(optimizer: OptimizerConfig, where: str) -> None:
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"optimizer.min_lr: {optimizer.min_lr}; at most optimizer.lr ({optimizer.lr}), from which the rate decays"
        )


@_check.register
def _(export: ExportConfig, where: str) -> None:
    parse_size(export.max_shard_size, f"{where}.max_shard_size")
