"""An export against its checkpoint: every tensor, grafted or not, without a model and in little memory."""

import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tiny_models import rewrite, rewrite_config
from toy_run import write_run

from megatron_lpr import cli
from megatron_lpr.conversion.export.export import export_checkpoint
from megatron_lpr.conversion.verify.verify import verify_export
from megatron_lpr.platform import distributed
from megatron_lpr.recipe.settings import ExportConfig
from megatron_lpr.testing.toy_models import write_toy_model

ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
NEW = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Base, instruct model, a run, its export and its grafted export."""
    root = tmp_path_factory.mktemp("run")
    base = write_toy_model(root / "base")
    instruct = write_toy_model(root / "instruct", seed=1, max_position_embeddings=256, eos_token_id=7)
    write_run(base, root / "run")
    settings = ExportConfig(max_shard_size="40KB")
    export_checkpoint(root / "run", root / "plain", base_dir=base, settings=settings)
    export_checkpoint(root / "run", root / "grafted", base_dir=base, graft_delta=(base, instruct))
    return root


@pytest.fixture
def verify(root, capsys, monkeypatch):
    """verify(export, *options) -> (status, printed); Megatron is not there."""
    monkeypatch.setattr(distributed, "join", None)

    def run(export, *options):
        status = cli.main(["verify", str(export), "--checkpoint", str(root / "run"), *options])
        printed, error = capsys.readouterr()
        told = [line for line in error.splitlines() if line and not line.startswith("verify: ")]  # the progress bar
        assert "Traceback" not in error and len(told) == (1 if status else 0)
        return status, printed + error

    return run


def test_tensors_alone_need_no_megatron(root, verify):
    status, printed = verify(root / "plain", "--no-logits")
    assert status == 0 and "ok    checkpoint     every tensor equals its own" in printed
    assert "logits         not compared: --no-logits" in printed


def test_logits_need_text(root, verify):
    status, printed = verify(root / "plain")
    assert status == 2 and "evaluation.corpora: empty" in printed and "--no-logits" in printed


def test_nothing_of_megatron_is_imported(root):
    script = (
        "import sys; from megatron_lpr import cli; "
        f"assert cli.main(['verify', '{root}/plain', '--checkpoint', '{root}/run', "
        "'--no-logits']) == 0; assert 'megatron.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("name", [ROUTER, NEW])
@pytest.mark.parametrize("kind", ["plain", "grafted"])
def test_what_the_base_knows_nothing_of(root, verify, tmp_path, name, kind):
    copy = shutil.copytree(root / kind, tmp_path / "copy")
    file = next(file for file in sorted(copy.glob("*.safetensors")) if name in load_file(file))
    change_one(file, name)
    graft = ["--graft-delta", str(root / "base"), str(root / "instruct")] if kind == "grafted" else []
    status, printed = verify(copy, "--no-logits", *graft)
    assert status == 2 and f"FAIL  checkpoint     1 tensors differ: {name}" in printed
    assert printed.count("FAIL") == 1


def change_one(file, name):
    from safetensors.torch import save_file

    tensors = load_file(file)
    tensors[name][1, 2] *= 1.001
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_grafted_export(root, verify):
    graft = ["--graft-delta", str(root / "base"), str(root / "instruct")]
    status, printed = verify(root / "grafted", *graft)
    assert status == 0 and "ok    checkpoint" in printed and "ok    frozen tensors" in printed
    assert "logits         not compared: no Megatron model has the delta" in printed


def test_a_grafted_export_without_its_checkpoint(root, capsys):
    options = ["--graft-delta", str(root / "base"), str(root / "instruct")]
    assert cli.main(["verify", str(root / "grafted"), *options]) == 0
    assert "21 of 21 equal" in capsys.readouterr().out


def test_a_grafted_export_says_that_it_is_one(root, verify):
    status, printed = verify(root / "grafted", "--no-logits")
    assert status == 2 and "was grafted: give --graft-delta BASE INSTRUCT" in printed
    status, printed = verify(root / "plain", "--graft-delta", str(root / "base"), str(root / "instruct"))
    assert status == 2 and "was not grafted (--graft-delta)" in printed


def test_a_delta_of_other_models(root, verify, tmp_path):
    other = rewrite(shutil.copytree(root / "instruct", tmp_path / "other"), lambda t: t["model.norm.weight"].mul_(2))
    rewrite_config(other, eos_token_id=8)
    status, printed = verify(root / "grafted", "--graft-delta", str(root / "base"), str(other))
    assert status == 2 and "FAIL  frozen tensors" in printed and "FAIL  checkpoint" in printed
    assert f"'{other}' is not the model that the export was made with: config.json differ" in printed


def test_a_delta_from_another_base(root, tmp_path):
    other = rewrite_config(shutil.copytree(root / "base", tmp_path / "other"), use_cache=False)
    report = verify_export(root / "grafted", root / "instruct", grafted_on=other)
    assert [check.name for check in report.checks if not check.ok] == ["record"]
    assert f"'{other}' is not the model that the export was made with: config.json differ" in str(report)


def drop(export, file):
    (export / file).unlink()


def text(file, content):
    return lambda export: (export / file).write_text(content)


def field(name, value):
    return lambda export: rewrite_config(export, **{name: value})


def lose_a_tensor(export):
    """From its shard, not from the index."""
    from safetensors.torch import save_file

    file = sorted(export.glob("*.safetensors"))[1]
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_tensor,
        field("num_local_experts", 4),
        field("num_local_experts", "3"),
        field("num_experts_per_tok", "2"),
        field("num_experts_per_tok", None),
        field("architectures", "MixtralForCausalLM"),
        field("architectures", []),
        field("architectures", 5),
        field("dtype", "int3"),
        field("rope_parameters", 3),
        field("hidden_size", "many"),
        field("model_type", "no_such_model"),
        text("config.json", "{"),
        text("config.json", "[]"),
        text("model.safetensors.index.json", "{"),
        text("model.safetensors.index.json", '{"weight_map": ["a"]}'),
        text("model.safetensors.index.json", '{"weight_map": {"a": 3}}'),
        lambda export: drop(export, sorted(path.name for path in export.glob("*.safetensors"))[0]),
        lambda export: drop(export, "config.json"),
    ],
)
def test_damage_ends_in_a_sentence_or_a_line(root, verify, tmp_path, damage):
    copy = shutil.copytree(root / "plain", tmp_path / "copy")
    damage(copy)
    status, printed = verify(copy, "--no-logits")
    assert status == 2, printed


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Comparing 200 MB takes far less."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 257}
    base = write_toy_model(tmp_path / "base", **sizes)
    write_run(base, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out", base_dir=base)
    script = (
        "import resource; from pathlib import Path; from megatron_lpr.conversion.record import made_of; "
        "from megatron_lpr.conversion.verify.tensors import compare_with_checkpoint as compare; "
        f"folder, base = Path('{tmp_path}/run/checkpoints/step_00000004'), '{tmp_path}/base'; made = made_of(folder); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"assert compare(folder, made, '{tmp_path}/out', base).ok; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert size > 150e6 and int(printed) * 1024 < 0.4 * size, (size, printed)
