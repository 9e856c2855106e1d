"""Every number of a recipe has a range, is held to it, and says so; and settings that contradict each other."""

import dataclasses
import math
import typing

import pytest

from megatron_lpr.cli import main
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.fields import LARGEST_INT, Range, parse_size, range_of
from megatron_lpr.recipe.reading import describe, from_tree, load_recipe
from megatron_lpr.recipe.sections import check_section, check_setting
from megatron_lpr.recipe.settings import OptimizerConfig, Recipe, TrainConfig
from megatron_lpr.recipe.text_settings import EvaluationConfig

CORPUS = {"name": "x", "files": ["a"], "language": "hu", "role": "expanded"}
# A recipe with all its sections.
TREE = {
    "name": "x",
    "output": "o",
    "model": {"base": "b"},
    "data": {"manifest": "m", "schedule": [{"from_sample": 8}]},
    "train": {"trainable": "all", "steps": 1},
    "evaluation": {"corpora": [CORPUS]},
    "preprocess": {"corpora": [CORPUS]},
}


def recipe_with(name, value):
    """TREE with one setting, by its dotted name in `describe`."""

    def put(tree, keys):
        key, *rest = keys
        if key.endswith("[]"):
            return tree | {key[:-2]: [put(tree[key[:-2]][0], rest)]}
        return tree | {key: put(tree.get(key, {}), rest) if rest else value}

    return from_tree(Recipe, put(TREE, name.split(".")), where="test")


def numeric_settings(cls=Recipe, prefix=""):
    """(name, field, int or float, list or mapping or neither) of every setting that is a number or some."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        parts = [hint, *typing.get_args(hint), *(a for h in typing.get_args(hint) for a in typing.get_args(h))]
        nested = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        number = next((part for part in parts if part in (int, float)), None)
        holder = next((kind for kind in (dict, tuple) for part in parts if typing.get_origin(part) is kind), None)
        if nested:
            yield from numeric_settings(nested, f"{name}[]." if holder else f"{name}.")
        elif number:
            yield name, field, number, holder


SETTINGS = {name: rest for name, *rest in numeric_settings()}


def wrapped(value, holder):
    return [value] if holder is tuple else {"expanded": value, "original": 1} if holder is dict else value


def test_no_setting_is_left_out():
    assert {
        "optimizer.lr",
        "data.schedule[].weights",
        "model.mlp_only_layers",
        "evaluation.max_bytes",
    } <= SETTINGS.keys()
    assert len(SETTINGS) > 40


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_are_held_to_their_range(name):
    field, number, holder = SETTINGS[name]
    valid = range_of(field, whole=number is int)
    assert valid != Range(), "no range is stated"
    stated = field.metadata["range"]
    assert any(line.startswith(f"  {name}: ") and str(stated) in line for line in describe())

    def complaint(value):
        try:
            recipe_with(name, wrapped(value, holder))
        except UserError as error:
            return str(error)
        return ""

    def beside(bound, towards):
        return bound + int(math.copysign(1, towards)) if number is int else math.nextafter(bound, towards)

    for bound, outwards, belongs in (
        (valid.at_least, -math.inf, True),
        (valid.above, -math.inf, False),
        (valid.at_most, math.inf, True),
        (valid.below, math.inf, False),
    ):
        if bound is None:
            continue
        inside, outside = (bound, beside(bound, outwards)) if belongs else (beside(bound, -outwards), bound)
        outside, inside = number(outside), number(inside)
        begin = f"test: {name.replace('[]', '[0]')}"
        assert complaint(outside).startswith(begin) and f": {outside}; " in complaint(outside)
        limit = valid if outside in stated else stated
        assert complaint(outside).endswith(f"; {limit}") and "\n" not in complaint(outside)
        assert not complaint(inside).endswith((f"; {valid}", f"; {stated}"))


@pytest.mark.parametrize("name", [name for name, (_, number, _) in SETTINGS.items() if number is float])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_are_finite(name, value):
    with pytest.raises(UserError, match=f"expected float, found {value}"):
        recipe_with(name, wrapped(value, SETTINGS[name][2]))


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("optimizer.lr", 0, "optimizer.lr: 0.0; above 0"),
        ("optimizer.lr", 2e30, "optimizer.lr: 2e+30; above 0, at most 1e+30"),
        ("optimizer.min_lr", 1e-4, "optimizer.min_lr: 0.0001; at most optimizer.lr (5e-05)"),
        ("optimizer.beta1", 1.5, "optimizer.beta1: 1.5; at least 0, below 1"),
        ("optimizer.eps", 0, "optimizer.eps: 0.0; at least 1e-30"),
        ("model.mlp_only_layers", [1, -1], "model.mlp_only_layers[1]: -1; at least 0"),
        ("train.seed", 2**63, "train.seed: 9223372036854775808; at least 0, at most 2^63 - 1"),
        ("train.global_batch_size", 2**62 + 1, "train.steps: 1 x global_batch_size 4611686018427387905 are more than"),
        ("data.mixture", {}, "data.mixture: asks for no data; give at least one role a share above 0"),
        ("data.mixture", {"expanded": 0, "original": 0}, "data.mixture: asks for no data"),
        ("data.mixture", {"expandd": 1}, "data.mixture: unknown role 'expandd'; did you mean 'expanded'?"),
        ("data.schedule", [{"from_sample": 4, "mixture": {"original": 0}}], "data.schedule[0].mixture: asks for no"),
        ("data.schedule", [{"from_sample": 4}, {"from_sample": 4}], "data.schedule[1].from_sample: 4 does not come"),
        ("data.schedule", [{"from_sample": 4}, {"from_sample": 0}], "data.schedule[1].from_sample: 0 does not come"),
        ("data.schedule", [{"from_sample": 0, "mixture": {"original": 1}}], "data.schedule[0].mixture: the mixture"),
        ("export.max_shard_size", "0", "export.max_shard_size: '0' is no size; write it as 500MB or 4GB"),
        ("export.max_shard_size", "4 bytes", "export.max_shard_size: '4 bytes' is no size"),
    ],
)
def test_refused_when_it_is_read(name, value, expected):
    with pytest.raises(UserError) as error:
        recipe_with(name, value)
    assert str(error.value).startswith(f"test: {expected}") and "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["preprocess", "inspect-data", "upcycle", "train"])
def test_every_command_refuses_a_number_outside_its_range(tmp_path, capsys, command):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{name: x, output: o, model: {base: b}, logging: {router_every: -3}}")
    assert main([command, str(recipe)]) == 2
    expected = f"megatron-lpr {command}: error: {recipe}: logging.router_every: -3; at least 1\n"
    assert capsys.readouterr() == ("", expected)


def test_sections_that_no_recipe_holds():
    check_section(OptimizerConfig(min_lr=5e-5), "optimizer")
    for section, expected in (
        (OptimizerConfig(lr=math.nan), r"^optimizer.lr: nan; above 0$"),
        (OptimizerConfig(min_lr=1.0), r"^optimizer.min_lr: 1.0; at most optimizer.lr"),
        (EvaluationConfig(batch=LARGEST_INT + 1), r"batch: 9223372036854775808; at least 1, at most 2\^63 - 1$"),
    ):
        with pytest.raises(UserError, match=expected):
            check_section(section, "optimizer")
    check_setting(TrainConfig, "seed", 0, "seed")
    with pytest.raises(UserError, match=r"^the seed: -1; at least 0$"):
        check_setting(TrainConfig, "seed", -1, "the seed")


@pytest.mark.parametrize(
    "size, expected",
    [("500MB", 500 * 10**6), ("1.5gb", 15 * 10**8), ("7", 7), ("1e3KB", 10**6)]
    + [(size, None) for size in ("", "GB", "0MB", "-1GB", "nan", "inf", "1e400", "9e9TB", "4GiB")],
)
def test_sizes(size, expected):
    if expected is not None:
        assert parse_size(size, "size") == expected
        return
    with pytest.raises(UserError, match=f"^size: '{size}' is no size"):
        parse_size(size, "size")


def test_long_whole_numbers_keep_their_digits(tmp_path):
    (tmp_path / "r.yaml").write_text("{name: x, output: o, model: {base: b}, preprocess: {seed: '9007199254740993'}}")
    assert load_recipe(str(tmp_path / "r.yaml")).preprocess.seed == 2**53 + 1
    with pytest.raises(UserError, match="preprocess.seed: 1000"):
        recipe_with("preprocess.seed", 10**400)
    with pytest.raises(UserError, match="optimizer.lr: expected float, found 1000"):
        recipe_with("optimizer.lr", 10**400)
