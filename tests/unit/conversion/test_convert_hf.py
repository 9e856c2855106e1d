"""The command line of tools/convert_hf.py: exit status and messages."""

import importlib.util
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_run import write_run

from megatron_lpr import cli
from megatron_lpr.conversion import import_hf
from megatron_lpr.conversion.export.export import upcycle_hf
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.files import output_place
from megatron_lpr.platform import distributed
from megatron_lpr.testing.toy_models import write_toy_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def convert_hf():
    spec = importlib.util.spec_from_file_location("convert_hf", ROOT / "tools" / "convert_hf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_upcycle_then_verify(convert_hf, llama, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert convert_hf(["hf-to-hf", str(llama), out, "--num-experts", "4", "--num-frozen", "2"]) == 0
    assert cli.main(["verify", out, "--base", str(llama), "--num-frozen", "2"]) == 0
    assert "27 of 27 equal" in capsys.readouterr().out
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert cli.main(["verify", out, "--base", str(llama)]) == 2
    assert "FAIL  files" in capsys.readouterr().out


def test_a_mistake_of_the_user_is_one_sentence(convert_hf, tmp_path, capsys):
    assert convert_hf(["hf-to-hf", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--num-experts", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert_hf.py hf-to-hf: error: model folder") and error.count("\n") == 1


def test_an_export_for_llama_cpp(convert_hf, llama, tmp_path, capsys):
    """A Qwen2-MoE export becomes a folder; of any other the message says that it needs none."""
    base, export, out = (str(tmp_path / name) for name in ("base", "export", "out"))
    write_toy_model(base, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    assert convert_hf(["hf-to-hf", base, export, "--num-experts", "3"]) == 0
    assert convert_hf(["for-llama-cpp", export, out, "--dry-run"]) == 0 and not Path(out).exists()
    assert convert_hf(["for-llama-cpp", export, out]) == 0
    assert f"wrote {out}: give it to convert_hf_to_gguf.py" in capsys.readouterr().out
    assert convert_hf(["for-llama-cpp", str(llama), str(tmp_path / "other")]) == 2
    assert "is no Qwen2MoeForCausalLM" in capsys.readouterr().err


def test_options_of_experts_on_a_dense_import(convert_hf, toy_base, tmp_path, capsys):
    base, out = str(toy_base), str(tmp_path / "out")
    for option in ("--num-frozen", "--router-std", "--seed", "--topk"):
        assert convert_hf(["hf-to-megatron", base, out, option, "2", "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert f"{option} 2" in error and "has no effect, for a dense import has no experts" in error
    upcycle_hf(toy_base, tmp_path / "moe", Expansion(num_experts=4))
    again = ["hf-to-megatron", str(tmp_path / "moe"), out, "--dry-run"]
    assert convert_hf([*again, "--seed", "2"]) == 2
    assert "--seed 2: has no effect, for no expert is new" in capsys.readouterr().err
    assert convert_hf([*again, "--num-frozen", "2"]) == 0
    again = ["hf-to-hf", str(tmp_path / "moe"), out, "--num-experts", "4", "--num-frozen", "4", "--dry-run"]
    assert convert_hf([*again, "--router-std", "1"]) == 2
    assert "--router-std 1.0: has no effect, for no expert is new" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value, told",
    [
        ("--router-std", "nan", "--router-std: nan; at least 0, at most 100"),
        ("--router-std", "-1", "--router-std: -1.0; at least 0, at most 100"),
        ("--seed", str(2**64), "--seed: 18446744073709551616; at least 0, at most 2^63 - 1"),
    ],
)
def test_numbers_of_new_routers(convert_hf, toy_base, tmp_path, capsys, option, value, told):
    command = ["hf-to-hf", str(toy_base), str(tmp_path / "out"), "--num-experts", "4", "--dry-run"]
    assert convert_hf([*command, option, value]) == 2
    assert told in capsys.readouterr().err


def test_checkpoint_to_hf(convert_hf, toy_base, tmp_path, capsys):
    write_run(toy_base, tmp_path / "run", recipe={"model": {"base": str(tmp_path / "moved"), "num_experts": 3}})
    command = ["megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "out")]
    assert convert_hf(command) == 2
    assert f"its base model was in {tmp_path / 'moved'}, which is not there now" in capsys.readouterr().err
    options = ["--base", str(toy_base), "--dtype", "bfloat16", "--max-shard-size", "20KB"]
    assert convert_hf([*command, *options]) == 0
    assert "21 of 21 equal" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert shlex.join(["convert_hf.py", *command, *options]) in (tmp_path / "out/README.md").read_text()
    assert convert_hf([*command, *options]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_grafted_export_of_nothing_is_the_export(convert_hf, toy_base, tmp_path, capsys):
    write_run(toy_base, tmp_path / "run")
    for out, options in (("plain", ["--no-verify"]), ("grafted", ["--graft-delta", str(toy_base), str(toy_base)])):
        assert convert_hf(["megatron-to-hf", str(tmp_path / "run"), str(tmp_path / out), *options]) == 0
    printed = capsys.readouterr().out
    assert "plain; not verified" in printed and "21 of 21 equal" in printed
    plain, grafted = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "grafted"))
    assert all(torch.equal(tensor, grafted[name]) for name, tensor in plain.items())


def test_an_export_that_is_not_the_bases_is_refused(convert_hf, toy_base, tmp_path, capsys):
    write_run(toy_base, tmp_path / "run")
    other = shutil.copytree(toy_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors")
    assert convert_hf(["megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--base", str(other)]) == 2
    printed, error = capsys.readouterr()
    assert "FAIL  frozen tensors 20 of 21" in printed
    assert ": error: " in error.splitlines()[-1] and "was not written" in error.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]


@pytest.mark.parametrize("option", [["--dtype", "int8"], ["--max-shard-size", "big"]])
def test_impossible_options(convert_hf, toy_base, tmp_path, capsys, option):
    write_run(toy_base, tmp_path / "run")
    assert convert_hf(["megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "out"), *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert_hf.py megatron-to-hf: error: ") and error.count("\n") == 1 and option[1] in error


@pytest.mark.parametrize("command", ["hf-to-hf", "hf-to-megatron", "megatron-to-hf"])
def test_help(convert_hf, capsys, command):
    with pytest.raises(SystemExit) as stop:
        convert_hf([command, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "usage" in printed and "default: True" not in printed
    assert "None" not in printed.partition("settings of a recipe")[0]
    assert "--dry-run" in printed


def test_help_of_the_tool(convert_hf, capsys):
    assert convert_hf(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(door in printed for door in ("hf-to-hf", "hf-to-megatron", "megatron-to-hf"))


def test_a_float16_base_becomes_float32(convert_hf, tmp_path, monkeypatch, capsys):
    base = write_toy_model(tmp_path / "base", dtype="float16")
    recipes = []
    monkeypatch.setattr(import_hf, "import_hf", lambda recipe, **options: recipes.append(recipe))
    for options in ([], ["--dtype", "bfloat16"]):
        assert convert_hf(["hf-to-megatron", str(base), str(tmp_path / "out"), *options]) == 0
    assert [recipe.model.dtype for recipe in recipes] == ["float32", "bfloat16"]
    assert capsys.readouterr().err.count("is float16, in which nothing is trained here") == 1


def test_a_float16_base_is_exported_byte_for_byte(convert_hf, tmp_path, capsys):
    base = write_toy_model(tmp_path / "base", dtype="float16")
    write_run(base, tmp_path / "run")
    assert convert_hf(["megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    printed, error = capsys.readouterr()
    assert "21 of 21 equal the base" in printed and "warning" not in error
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert after[name].dtype == torch.float16 and torch.equal(before[name], after[name])


def test_experts_of_the_base_keep_their_top_k(convert_hf, toy_base, tmp_path, monkeypatch, capsys):
    upcycle_hf(toy_base, tmp_path / "moe", Expansion(num_experts=4, topk=3))
    recipes = []
    monkeypatch.setattr(import_hf, "import_hf", lambda recipe, **options: recipes.append(recipe))
    assert convert_hf(["hf-to-megatron", str(tmp_path / "moe"), str(tmp_path / "out")]) == 0
    assert convert_hf(["hf-to-megatron", str(tmp_path / "moe"), str(tmp_path / "out"), "--topk", "2"]) == 0
    assert [recipe.model.topk for recipe in recipes] == [3, 2]  # import_hf refuses the second
    more = ["hf-to-hf", str(tmp_path / "moe"), str(tmp_path / "out"), "--num-experts", "6", "--num-frozen", "4"]
    assert convert_hf([*more, "--dry-run"]) == 0
    assert convert_hf([*more, "--topk", "2", "--dry-run"]) == 2
    assert "routes to its top 3 experts" in capsys.readouterr().err


def test_dry_runs_check_and_write_nothing(convert_hf, toy_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "join", None)
    write_run(toy_base, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    base, run, out = str(toy_base), str(tmp_path / "run"), str(tmp_path / "out")
    inside = str(toy_base / "out")
    for door, good, bad in (
        (["hf-to-hf", "--num-experts", "3"], [base, out], [base, inside]),
        (["hf-to-megatron", "--num-experts", "3"], [base, out], [base, inside]),
        (["megatron-to-hf"], [run, out], [run, inside]),
    ):
        assert convert_hf([door[0], *good, *door[1:], "--dry-run"]) == 0
        printed, error = capsys.readouterr()
        assert printed.startswith("would ") and printed.count("\n") == 1 and error == ""
        assert convert_hf([door[0], *bad, *door[1:], "--dry-run"]) == 2
        assert capsys.readouterr().err.startswith(f"convert_hf.py {door[0]}: error: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["base", "base/out", "file", "file/out", "run"])
def test_an_output_that_cannot_be(convert_hf, tmp_path, monkeypatch, capsys, out):
    base = write_toy_model(tmp_path / "base")
    write_run(base, tmp_path / "run")
    (tmp_path / "file").touch()
    monkeypatch.setattr(distributed, "join", None)
    before = sorted(tmp_path.rglob("*"))
    for command in (["hf-to-hf", str(base)], ["hf-to-megatron", str(base)]):
        assert convert_hf([*command, str(tmp_path / out), "--num-experts", "3"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"convert_hf.py {command[0]}: error: ") and error.count("\n") == 1
        assert str(tmp_path / out) in error
    assert sorted(tmp_path.rglob("*")) == before


def test_import_without_space(convert_hf, toy_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "join", None)
    monkeypatch.setattr(output_place.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**4))
    for door in ("hf-to-megatron", "hf-to-hf"):
        assert convert_hf([door, str(toy_base), str(tmp_path / "out"), "--num-experts", "3"]) == 2
        assert "has 0.0 GB free, the checkpoint needs 0.0 GB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
