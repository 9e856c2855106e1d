"""YAML of people: strict, fast, and refused in one sentence."""

import pytest
import yaml

from megatron_lpr.errors import UserError
from megatron_lpr.files.yaml_io import _Base, parse_yaml, read_yaml
from megatron_lpr.recipe.reading import load_recipe


def refused(text: str) -> str:
    with pytest.raises(UserError) as error:
        parse_yaml(text, "here")
    message = str(error.value)
    assert message.startswith("here: ") and "\n" not in message
    return message


def test_the_c_parser_is_used():
    assert not yaml.__with_libyaml__ or _Base is yaml.CSafeLoader


@pytest.mark.parametrize("text", ["a: 1\nb: [x, 1.5, true, null]\n", "", "18446744073709551615", "{a: {a: 1}, b: 2}"])
def test_reads_what_yaml_reads(text):
    assert parse_yaml(text, "here") == yaml.safe_load(text)


def test_a_key_twice_is_refused_with_its_line():
    assert "line 3: the key 'a' is there already, in line 1; keep one" in refused("a: 1\nb: 2\na: 3\n")
    assert "line 4: the key 'w'" in refused("list:\n- {x: 1}\n- w: 1\n  w: 2\n")
    assert "the key 'True'" in refused("yes: 1\ntrue: 2\n")


def test_merged_keys_may_be_there_again():
    text = "a: {inner: &a {<<: &b {x: 1, y: 2}, x: 3}}\nc: {<<: *a, y: 4}\n"
    assert parse_yaml(text, "here") == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: [", "not valid YAML"),
        ("a: " + "1" * 400, "the number 111111111111111111111111111111... is too large"),
        ("a: " + "1" * 5000, "is too large"),
        ("a: !!float x", "not valid YAML: could not convert"),
        ("[" * 3000, "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: \0", "not valid YAML"),
    ],
)
def test_what_is_not_yaml(text, expected):
    assert expected in refused(text)


def test_files(tmp_path):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "bom.yaml", "here") == {"a": 1}
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(UserError, match="here: not UTF-8 text .byte 11, about line 2"):
        read_yaml(tmp_path / "latin.yaml", "here")
    with pytest.raises(UserError, match="here: cannot be read: Is a directory"):
        read_yaml(tmp_path, "here")


MINIMUM = "name: x\noutput: out\nmodel: {base: b}\n"


@pytest.mark.parametrize(
    "more, expected",
    [
        ("include: [a.yaml]", r"include names one file, as include: common.yaml, not \['a.yaml'\]"),
        ("include: .", "recipe .*: a folder; give the YAML file of a recipe"),
        ("optimizer: {lr: 1, lr: 2}", "line 4: the key 'lr'"),
        ("evaluation: {max_bytes: 1" + "0" * 400 + "}", "is too large"),
        ("optimizer: {lr: 1e400}", "lr: expected float, found '1e400'"),
        ("optimizer: {lr: 1.0e+400}", "lr: expected float, found inf"),
        ("evaluation: {max_bytes: 1e400}", "max_bytes: expected int"),
    ],
)
def test_recipes(tmp_path, more, expected):
    (tmp_path / "r.yaml").write_text(f"{MINIMUM}{more}\n")
    with pytest.raises(UserError, match=expected):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_folder_or_latin_1_for_a_recipe(tmp_path):
    with pytest.raises(UserError, match="recipe .*: a folder; give the YAML file of a recipe"):
        load_recipe(str(tmp_path))
    (tmp_path / "r.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match="recipe .*r.yaml: not UTF-8 text"):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("entry", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_make_billions_of_a_few_lines_are_refused_at_once(entry):
    lines = ["a0: &a0 {k: v}"]
    for level in range(1, 10):
        lines.append(f"a{level}: &a{level} " + entry.format(", ".join([f"*a{level - 1}"] * 10)))
    with pytest.raises(UserError, match=r"^recipe: its aliases \(\*name\) repeat more than 1,000,000 entries"):
        parse_yaml("\n".join(lines), "recipe")
    assert parse_yaml("\n".join(lines[:3]), "recipe")["a1"]
