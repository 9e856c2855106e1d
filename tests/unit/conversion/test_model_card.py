"""The card of an export tells what the files of its run tell."""

import json

import pytest
import yaml
from toy_run import write_run

from megatron_lpr.config import ExportConfig
from megatron_lpr.conversion.export import export_checkpoint, upcycle_hf
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.retention import EvaluationResult

ALPHA, GAMMA = {"balance": {"coeff": 0.02}}, {"lpr": {"coeff": 0.1}}


def train(trainable):
    return {"train": {"trainable": trainable, "steps": 4}}


@pytest.fixture
def two_stages(toy_base, tmp_path):
    """Stage 2 of a run that started from stage 1, which started from an upcycled checkpoint that is gone."""
    corpora = {
        "books": {"digest": "a" * 64, "language": "hu", "role": "expanded", "weight": 1.0, "tokens": 1234567},
        "news": {"digest": "b" * 64, "language": "en", "role": "original", "weight": 1.0, "tokens": 89},
    }
    model = {"base": str(toy_base), "num_experts": 3, "router_init_seed": 11, "router_init_std": 0.03}
    first = model | {"load": str(tmp_path / "gone")}
    stage1 = {"name": "stage1", "model": first, **train("new_experts_and_routers"), **ALPHA}
    write_run(
        toy_base, tmp_path / "stage1", recipe=stage1, tokens_per_language={"hu": 4000, "en": 0},
        data_state={"manifest": "c" * 64, "corpora": corpora},
    )  # fmt: skip
    second = model | {"load": str(tmp_path / "stage1")}
    write_run(toy_base, tmp_path / "stage2", recipe={"name": "stage2", "model": second, **train("routers"), **GAMMA})
    records = [{"step": step, "ntp_loss": 5 - step, "balance_loss": 1.25, "lpr_loss": None} for step in (3, 4, 5)]
    (tmp_path / "stage1/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "stage2"


def result(name, bits):
    corpora = [("hu help", "hu", "expanded", bits[0]), ("en book", "en", "original", bits[1])]
    return EvaluationResult(
        model=name,
        window=32,
        corpora=tuple(
            CorpusScore(name=n, language=lang, role=role, bytes=1000, tokens=100, bits_per_byte=b)
            for n, lang, role, b in corpora
        ),
    )


def test_stages_data_losses_and_results(two_stages, toy_base, tmp_path):
    files = tuple(str(tmp_path / f"{name}.json") for name in ("base", "two"))
    for file, scores in zip(files, (result("base", (2.5, 1.0)), result("stage 2", (1.5, 1.25))), strict=True):
        scores.save(file)
    settings = ExportConfig(results=files)
    reports = []
    out = export_checkpoint(
        two_stages, tmp_path / "out", base_dir=toy_base, settings=settings, on_verified=reports.append, command="x y"
    )
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "base" and header["language"] == ["en", "hu"] and "moe" in header["tags"]
    for fact in (
        "3 experts", "top-2", "Expert 0 is the original", "N(0, 0.03) with seed 11",
        "Languages it already spoke: en.", "Languages it was expanded to: hu.",
        "`new_experts_and_routers` for 4 steps (8 samples) with NTP + 0.02 · balance",
        "Losses of the last step: NTP 1.0000, balance 1.2500.",
        f"| books | hu | expanded | 1,234,567 | 4,000 | `{'a' * 64}` |", f"manifest: `{'c' * 64}`",
        "`routers` for 4 steps (8 samples) with NTP + 0.1 · LPR",
        "80.0% kept", "-1.000", "in float32", reports[0].frozen_sha256, "    x y",
    ):  # fmt: skip
        assert fact in card, fact
    assert card.index("## stage1") < card.index("## stage2") < card.index("## Results")


def test_results_that_are_not_there(two_stages, toy_base, tmp_path):
    settings = ExportConfig(results=(str(tmp_path / "none.json"),))
    with pytest.raises(UserError, match="none.json: cannot be read"):
        export_checkpoint(two_stages, tmp_path / "out", base_dir=toy_base, settings=settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "", "{", '{"step": 4}\n', '[1]\n{"step": 4, "ntp_loss": 1.0}x'])
def test_metrics_that_are_gone_or_broken_are_left_out(two_stages, toy_base, tmp_path, content):
    metrics = tmp_path / "stage1/metrics.jsonl"
    metrics.unlink() if content is None else metrics.write_text(content)
    card = (export_checkpoint(two_stages, tmp_path / "out", base_dir=toy_base) / "README.md").read_text()
    assert "## stage1" in card and "Losses" not in card


def test_upcycled_and_dense_models_were_not_trained(toy_base, tmp_path):
    card = (upcycle_hf(toy_base, tmp_path / "a", num_experts=4, seed=5) / "README.md").read_text()
    assert "4 experts" in card and "the function is the base's" in card and "seed 5" in card
    write_run(toy_base, tmp_path / "run", recipe={"model": {"base": str(toy_base), "num_experts": 0}})
    card = (export_checkpoint(tmp_path / "run", tmp_path / "b", base_dir=toy_base) / "README.md").read_text()
    assert "`base`, converted without training." in card and "moe" not in card and "post-trained" not in card


def test_a_model_that_was_expanded_again(toy_base, tmp_path):
    once = upcycle_hf(toy_base, tmp_path / "once", num_experts=3)
    card = (upcycle_hf(once, tmp_path / "twice", num_experts=5, num_frozen=3) / "README.md").read_text()
    assert "The 3 experts of every layer of `once` became 5 experts" in card
    assert "new experts are copies of expert 0" in card and "the function is the base's" not in card
    write_run(once, tmp_path / "run", recipe={
        "model": {"base": str(once), "num_experts": 5, "num_frozen_experts": 3}, **train("routers")
    })  # fmt: skip
    card = (export_checkpoint(tmp_path / "run", tmp_path / "out", base_dir=once) / "README.md").read_text()
    assert "Experts 0 to 2 are those of `once`, never trained here" in card


def test_a_model_of_which_everything_was_trained(toy_base, tmp_path):
    write_run(toy_base, tmp_path / "run", recipe={"name": "full", **train("all")})
    card = (export_checkpoint(tmp_path / "run", tmp_path / "b", base_dir=toy_base) / "README.md").read_text()
    assert "Everything was trained." in card and "never trained" not in card and "SHA-256 over" not in card
