"""A login node: the cluster's packages of kernels are installed, and there is no GPU for them."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_lpr import cli
from megatron_lpr.platform.transformer_engine import kernels_run_here
from megatron_lpr.testing.toy_models import write_toy_project

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
# as where the driver is missing: Megatron expects an ImportError alone
CODE = "open({record!r}, 'a').write(__name__)\nraise RuntimeError('no CUDA-capable device is detected')\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = str(write_toy_project(tmp_path_factory.mktemp("project"))["stage1"])
    assert cli.main(["preprocess", path]) == 0
    return path


@pytest.fixture
def imported(tmp_path):
    """A file that names what was imported of the packages in the folder `installed` beside it."""
    record = tmp_path / "imported"
    for name in PACKAGES:
        folder = tmp_path / "installed" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(CODE.format(record=str(record)))
    (tmp_path / "installed/apex/multi_tensor_apply").mkdir()
    return record


def login_node(imported, *words):
    paths = [str(imported.parent / "installed"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if name != "TE_ON_CPU"}
    return subprocess.run(
        [sys.executable, "-m", "megatron_lpr.cli", *map(str, words)],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )


def test_training_imports_none_of_them(recipe, imported, tmp_path, capsys):
    changes = ["--set", "model.load=null", "--set", f"output={tmp_path}/out", "--set", "train.steps=2"]
    result = login_node(imported, "train", recipe, *changes)
    assert result.returncode == 0, result.stderr
    assert not imported.exists(), imported.read_text()
    evaluate = ["evaluate", tmp_path / "out", "--name", "x", "--out", tmp_path / "x.json", "--set"]
    for spec, status, told in (("te", 2, "model.spec: te needs a GPU"), ("local", 0, "")):  # of a cluster's checkpoint
        assert cli.main([*map(str, evaluate), f"model.spec={spec}"]) == status
        assert told in capsys.readouterr().err


def test_a_run_in_fp8_is_planned_and_rehearsed(recipe, imported):
    fp8 = ["--set", "fp8.recipe=tensorwise", "--set", "model.spec=te", "--set", "model.dtype=bfloat16"]
    result = login_node(imported, "plan", recipe, "--gpus", 2, "--rehearse", *fp8)
    assert result.returncode == 0 and "rehearsed    rank" in result.stdout, result.stderr
    assert not imported.exists(), imported.read_text()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (["model.spec=te"], "model.spec: te needs a GPU, and this machine shows none: take another, or use local"),
        (
            ["fp8.recipe=blockwise", "model.dtype=bfloat16"],
            "fp8.recipe: blockwise does not run here (it needs a GPU, and this machine shows none: take another); "
            "set none",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_here_and_not_for_other_machines(
    recipe, imported, monkeypatch, capsys, changes, sentence
):
    monkeypatch.syspath_prepend(imported.parent / "installed")
    words = ["train", recipe, "--dry-run", "--set", "model.load=null", *(f"--set={change}" for change in changes)]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"megatron-lpr train: error: {sentence}\n"
    assert cli.main([*words, "--ranks", "2"]) == 0
    if "te" in changes[0]:
        assert cli.main(["upcycle", recipe, "--dry-run", "--set", changes[0]]) == 2
        assert sentence in capsys.readouterr().err
    assert not imported.exists()


def test_what_stands_in_for_kernels_needs_no_gpu(monkeypatch, tmp_path):
    """Other modules of that name do."""
    import te_on_cpu

    assert not kernels_run_here()
    monkeypatch.delitem(sys.modules, "transformer_engine_torch", raising=False)  # hidden, where Megatron is imported
    monkeypatch.setenv(te_on_cpu.VARIABLE, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    te_on_cpu.install_on_import()
    assert kernels_run_here()
