"""Recipes: includes, overrides, names, types, and the way back."""

import dataclasses

import pytest
import yaml

from megatron_lpr.errors import UserError
from megatron_lpr.recipe import settings, text_settings
from megatron_lpr.recipe.reading import describe, from_tree, load_recipe, to_tree
from megatron_lpr.recipe.settings import LPRConfig, OptimizerConfig, ParallelConfig, Recipe

MINIMUM = {"name": "x", "output": "out", "model": {"base": "base"}}


@pytest.fixture
def write(tmp_path):
    def write(name, tree):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return str(tmp_path / name)

    return write


def refused(path, *overrides):
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_minimum_has_all_defaults(write):
    recipe = load_recipe(write("r.yaml", MINIMUM))
    assert recipe.optimizer == OptimizerConfig() and recipe.parallel == ParallelConfig()
    assert recipe.train is None and recipe.data is None


def test_include_lies_underneath_key_by_key(write):
    write("base/common.yaml", MINIMUM | {"optimizer": {"lr": 1.0, "eps": 0.5}, "name": "common"})
    write("middle.yaml", {"include": "base/common.yaml", "optimizer": {"lr": 2.0}, "lpr": {"coeff": 0.1}})
    recipe = load_recipe(write("top.yaml", {"include": "middle.yaml", "optimizer": {"beta1": 0.8}, "name": "top"}))
    assert (recipe.optimizer.lr, recipe.optimizer.eps, recipe.optimizer.beta1) == (2.0, 0.5, 0.8)
    assert recipe.name == "top" and recipe.lpr == LPRConfig(coeff=0.1)


def test_include_replaces_lists_and_can_unset(write):
    write("common.yaml", MINIMUM | {"model": {"base": "b", "load": "c"}, "data": {"manifest": "m"}})
    recipe = load_recipe(write("r.yaml", {"include": "common.yaml", "model": {"load": None}, "data": None}))
    assert recipe.model.base == "b" and recipe.model.load is None and recipe.data is None


def test_include_cycle(write):
    write("a.yaml", {"include": "b.yaml"})
    assert "includes itself" in refused(write("b.yaml", {"include": "a.yaml"}))


@pytest.mark.parametrize(
    "content, expected",
    [
        ("- 1", "found list"),
        ("", "is empty; a recipe has at least name, output and model"),
        ("a: [", "not valid YAML"),
        (None, "no such"),
    ],
)
def test_file_that_is_no_recipe(write, content, expected):
    assert expected in refused("nowhere.yaml" if content is None else write("r.yaml", content))


def test_overrides(write):
    path = write("r.yaml", MINIMUM | {"optimizer": {"lr": 1.0}, "model": {"base": "b", "load": "c"}})
    recipe = load_recipe(
        path,
        [
            "optimizer.lr=1e-4",  # YAML reads it as a string
            "optimizer.eps=1",
            "model.load=null",
            "model.num_experts=4",
            "data.manifest=m=1.yaml",
            "data.mixture={expanded: 1, original: 5e-1}",
            "data.mixture.original=2",
            "parallel.distributed_optimizer=false",
            "evaluation.max_bytes=10",
            "name=7",
            f"preprocess.seed={2**62 + 1}",
        ],
    )
    assert (recipe.optimizer.lr, recipe.optimizer.eps) == (1e-4, 1.0)
    assert recipe.model.load is None and recipe.model.num_experts == 4
    assert recipe.data.manifest == "m=1.yaml" and recipe.data.mixture == {"expanded": 1.0, "original": 2.0}
    assert recipe.parallel.distributed_optimizer is False and recipe.evaluation.max_bytes == 10
    assert recipe.name == "7" and recipe.preprocess.seed == 2**62 + 1


@pytest.mark.parametrize(
    "override, expected",
    [
        ("optimizer", "expected section.key=value"),
        ("=1", "expected section.key=value"),
        ("optimizer.learning=1", "unknown key 'learning'; valid: beta1"),
        ("optimizer.warmup=1", "unknown key 'warmup'; did you mean 'warmup_steps'?"),
        ("lr=1", "r.yaml: unknown key 'lr'; did you mean 'optimizer.lr'?"),
        ("train.lr=1", "train: unknown key 'lr'; did you mean 'optimizer.lr'?"),
        ("coeff=1", "unknown key 'coeff'; did you mean 'balance.coeff' or 'lpr.coeff'?"),
        ("lrp.coeff=1", "unknown key 'lrp'; did you mean 'lpr'?"),
        ("model.num_experts=two", "expected int, found 'two'"),
        ("model.num_experts=2.5", "expected int, found 2.5"),
        ("model.num_experts=true", "expected int, found true"),
        ("model.num_experts=.inf", "expected int, found inf"),
        ("model.num_experts=.nan", "expected int, found nan"),
        ("model.num_experts=null", "model.num_experts: is empty (null); give it a value, or leave it out"),
        ("model.dtype=null", "model.dtype: is empty (null)"),
        ("preprocess.heldout=null", "preprocess.heldout: is empty (null)"),
        ("preprocess.corpora=null", "preprocess.corpora: is empty (null)"),
        ("evaluation=null", "evaluation: is empty (null)"),
        ("data={manifest: m, mixture: null}", "data.mixture: is empty (null)"),
        ("optimizer.lr=[1]", "expected float, found [1]"),
        ("parallel.overlap_grad_reduce=yes please", "expected bool, found 'yes please'"),
        ("model.dtype=float16", "unknown value 'float16'; did you mean"),
        ("model=base", "expected a mapping, found 'base'"),
        ("data={mixture: {}}", "missing key 'manifest'"),
        ("data={manifest: m, mixture: 1}", "expected a mapping, found 1"),
        ("evaluation.corpora=[{name: x}]", "missing key 'files'"),
        ("evaluation.corpora=[x]", "corpora[0]: expected a mapping"),
        ("name.first=x", "'name' is a value, not a section"),
        ("optimizer.lr=[", "not valid YAML"),
        ("name=1.10", "name: expected str, found 1.1; write it in quotes"),
        ("optimizer.lr=23:55:00", "optimizer.lr: expected float, found '23:55:00'"),
        (
            "evaluation={corpora: [{name: a, files: f, language: no, role: original}]}",
            "found false; write it in quotes",
        ),
        ("model.load=", "override 'model.load=': has no value; give one, or null for none"),
        ("model.load=''", "model.load: is empty; give it a value, or leave it out"),
        ("evaluation={corpora: [{name: x, files: [' ']}]}", "evaluation.corpora[0].files[0]: is empty"),
    ],
)
def test_override_that_is_refused(write, override, expected):
    assert expected in refused(write("r.yaml", MINIMUM), override)


@pytest.mark.parametrize("name", ["2026-11-27", "20261128_01", "0012", "23:55:00", "0x10", "12"])
def test_a_name_of_digits_stays_as_it_is_written(write, name):
    recipe = load_recipe(write("r.yaml", MINIMUM), [f"name={name}", "train={trainable: all, steps: 1_000}"])
    assert recipe.name == name and recipe.train.steps == 1000
    assert load_recipe(write("again.yaml", to_tree(recipe))).name == name


def test_an_empty_text_is_no_setting_that_is_left_out(write):
    message = refused(write("r.yaml", MINIMUM | {"model": {"base": "b", "load": ""}}))
    assert "r.yaml: model.load: is empty; give it a value, or leave it out" in message


def test_missing_required_key_is_explained(write):
    message = refused(write("r.yaml", {"name": "x", "output": "out"}))
    assert "missing key 'model' (base model and upcycling)" in message


def test_single_file_stands_for_a_list(write):
    corpus = {"name": "x", "files": "a.jsonl", "language": "hu", "role": "expanded"}
    recipe = load_recipe(write("r.yaml", MINIMUM | {"evaluation": {"corpora": [corpus]}}))
    assert recipe.evaluation.corpora[0].files == ("a.jsonl",)


@pytest.mark.parametrize("key, word", [("no", "a bool"), ("~", "null")])
def test_a_key_that_yaml_takes_for_something_else(write, key, word):
    """Norwegian is no bool."""
    corpus = f"{{name: n, files: a, language: nb, role: expanded, languages: {{{key}: expanded}}}}"
    path = write("r.yaml", f"name: x\noutput: o\nmodel: {{base: b}}\npreprocess: {{corpora: [{corpus}]}}\n")
    with pytest.raises(UserError, match=rf"corpora\[0\].languages: YAML reads one of its keys as {word}; write"):
        load_recipe(path)


def test_tree_and_back():
    corpus = {"name": "x", "files": ["a", "b"], "language": "hu", "role": "expanded"}
    tree = MINIMUM | {"preprocess": {"corpora": [corpus]}, "train": {"trainable": "all", "steps": 3}}
    recipe = from_tree(Recipe, tree, where="test")
    assert from_tree(Recipe, yaml.safe_load(yaml.safe_dump(to_tree(recipe))), where="test") == recipe


def all_fields(cls=Recipe, prefix=""):
    for field in dataclasses.fields(cls):
        hint = str(field.type)
        nested = [c for c in SECTIONS if c.__name__ in hint]
        if nested:
            yield from all_fields(nested[0], f"{prefix}{field.name}{'[]' if 'tuple' in hint else ''}.")
        else:
            yield f"{prefix}{field.name}", field


SECTIONS = [c for c in (*vars(settings).values(), *vars(text_settings).values()) if dataclasses.is_dataclass(c)]


def test_every_setting_is_described():
    lines = "\n".join(describe())
    names = dict(all_fields())
    assert {"optimizer.lr", "evaluation.corpora[].role", "data.mixture", "preprocess.corpora[].weight"} <= names.keys()
    for name, field in names.items():
        assert f"\n  {name}: " in f"\n{lines}", name
        assert field.metadata["doc"] in lines
    assert lines.count("(required)") == sum(
        f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING for f in names.values()
    )


def test_a_part_of_the_settings_is_described():
    lines = describe(only=("name", "optimizer"))
    names = {line.split(":")[0].strip() for line in lines}
    assert names == {"name"} | {f"optimizer.{field.name}" for field in dataclasses.fields(OptimizerConfig)}
    assert [line for line in describe() if line in lines] == lines
