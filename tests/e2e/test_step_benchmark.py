"""benchmarks/train_step.py counts what it says, and its baseline computes the method."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_lpr.testing.toy_models import write_toy_model

FOLDER = Path(__file__).parents[2] / "benchmarks"
TOKENS, LENGTH = 64, 32


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_rows(tmp_path, capsys, megatron_imported):
    import train_step

    results = tmp_path / "results.json"
    asked = ["--shapes", "tiny", "--methods", "stage1", "moe_full", "dense", "--precision", "fp32", "mxfp8"]
    assert (
        train_step.main(
            [*asked, "--samples", "2", "--seq-length", str(LENGTH), "--rounds", "1", "--json", str(results)]
        )
        == 0
    )
    tree = json.loads(results.read_text())
    assert tree["versions"]["torch"] == torch.__version__
    rows = {(row["case"]["method"], row["case"]["precision"], row["by"]): row for row in tree["rows"]}
    assert len(rows) == 9  # the baseline has no FP8
    printed = capsys.readouterr().out
    for (method, precision, by), row in rows.items():
        assert f"| tiny | {method} | {precision} | {by} |" in printed
        if precision != "fp32":  # nothing that a CPU has, and said so
            assert row["skipped"] and row["seconds"] is None
            continue
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(TOKENS)
        assert row["tflops"] * row["seconds"] * 1e12 == pytest.approx(row["flops"])
        assert (row["parts"] is None) == (by == "plain")
    # two layers of queries, keys, values and output, and a gated FFN; the output layer: each thrice, 2 per multiply-add
    weights = 2 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48) + 256 * 32
    dense, stage1, full = (rows[method, "fp32", "megatron_lpr"] for method in ("dense", "stage1", "moe_full"))
    assert dense["flops"] == pytest.approx(6 * TOKENS * weights)
    assert rows["dense", "fp32", "plain"]["flops"] == pytest.approx(6 * TOKENS * weights)
    assert rows["stage1", "fp32", "plain"]["flops"] == pytest.approx(stage1["flops"], rel=0.1)  # routed otherwise
    of_experts = {"attention", "router", "dispatch", "frozen expert", "new experts", "output and loss", "optimizer"}
    assert of_experts | {"data", "gradients", "rest"} == set(stage1["parts"])
    assert "dense FFN" in dense["parts"] and "router" not in dense["parts"]
    # in fp32: 4 bytes a weight, 4 a gradient, two moments; a stage has frozen weights, and the base without them none
    assert dense["memory"]["frozen"] == full["memory"]["frozen"] == 0 < stage1["memory"]["frozen"]
    assert stage1["memory"]["optimizer"] == pytest.approx(2 * stage1["memory"]["trained"], rel=0.01)
    assert f"tiny, stage1, fp32: {full['seconds'] / stage1['seconds']:.2f}x moe_full" in "".join(tree["ratios"])


def test_a_row_that_fails_is_said(capsys, monkeypatch, megatron_imported):
    import train_step

    def measure(entries, folder, options):
        raise RuntimeError("it broke\nin two lines")

    monkeypatch.setattr(train_step, "measure", measure)
    assert (
        train_step.main(["--shapes", "tiny", "--methods", "stage1", "dense", "--precision", "fp32", "--no-baseline"])
        == 1
    )
    printed = capsys.readouterr()
    assert printed.out.count("not run: RuntimeError: it broke |") == 2 and "Traceback" in printed.err


def test_cut_models_keep_their_proportions():
    from step_cases import SHAPES

    for shape in SHAPES.values():
        assert shape.vocabulary(shape.whole) == shape.config["vocab_size"]
    assert SHAPES["8B"].vocabulary(4) == 128256 // 8 // 128 * 128


@pytest.mark.parametrize("method", ["stage1", "stage2", "dense"])
def test_baseline_is_the_method(tmp_path, megatron, method):
    from step_cases import SHAPES, Case, plan_of
    from step_contestants import Plain, leave

    from megatron_lpr.training.optimizer import trainable_parameters
    from megatron_lpr.training.train import Trainer

    write_toy_model(tmp_path / "tiny-2-256", dtype="bfloat16", **SHAPES["tiny"].config | {"num_hidden_layers": 2})
    case = Case(
        shape="tiny",
        method=method,
        precision="fp32",
        layers=2,
        vocabulary=256,
        experts=4,
        samples=4,
        micro_batch=2,
        seq_length=LENGTH,
    )
    plan = plan_of(case, tmp_path)
    trainer, plain = Trainer(plan), Plain(case, plan)
    base = load_file(tmp_path / "tiny-2-256" / "model.safetensors")
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            if ".gate." not in name:
                parameter.copy_(base[_of_base(name)])
    assert sum(p.numel() for p in plain.learns) == trainable_parameters(trainer.chunks)
    plain.step()
    # all experts are copies of one FFN still, so that it does not matter which router chose them
    assert plain.ntp_loss == pytest.approx(trainer.train_step()["ntp_loss"], rel=1e-5)
    del trainer
    leave()


def test_report(tmp_path, capsys, monkeypatch):
    """Tests and figures in two files named after day and hardware; without a GPU a sentence."""
    import gpu_report

    if not torch.cuda.is_available():
        assert gpu_report.main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\n"
    )

    def measure(arguments):
        assert arguments[0] == "--no-parts"
        print("the table")
        Path(arguments[-1]).write_text('{"rows": []}')

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        gpu_report.train_step, "surroundings", lambda: {"date": "2026-11-26", "hardware": "NVIDIA H100"}
    )
    monkeypatch.setattr(gpu_report.train_step, "main", measure)
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_report, "TESTS", ".")
    assert gpu_report.main(["--no-parts"]) == 1  # a test has failed
    page, figures = (tmp_path / f"2026-11-26-nvidia-h100.{suffix}" for suffix in ("md", "json"))
    assert "1 passed, 1 failed, 1 skipped" in page.read_text() and "* failed: test_it::test_b" in page.read_text()
    assert "the table" in page.read_text() and "the table" in capsys.readouterr().out
    assert json.loads(figures.read_text())["tests"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    earlier = page.read_text(), figures.read_text()
    assert gpu_report.main(["--no-parts", "--no-tests"]) == 0
    assert (page.read_text(), figures.read_text()) == earlier and (tmp_path / "2026-11-26-nvidia-h100-2.json").is_file()


def _of_base(name: str) -> str:
    """The tensor of the dense model that a parameter of the baseline is a copy of."""
    head, experts, rest = name.partition(".experts.")
    name = f"{head}.{rest.partition('.')[2]}" if experts else name
    return name if name.startswith("lm_head") else f"model.{name}"
