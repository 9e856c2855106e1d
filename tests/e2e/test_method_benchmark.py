"""benchmarks/method.py: all arms read the same samples, and a whole comparison runs from text to tables."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_lpr.cli import main as megatron_lpr
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler

FOLDER = Path(__file__).parents[2] / "benchmarks"
CORPORA = {
    "lohelp.hu.train": "Az ablakban kattintson a gombra. ",
    "lohelp.en.train": "Click the button in the window. ",
    "lohelp.hu.heldout": "A gombra kattintva bezárja az ablakot. ",
    "handbook.en.heldout": "The administrator reads the handbook. ",
    "handbook.de.heldout": "Der Verwalter liest das Handbuch. ",
    "lohelp.hu.validation": "Az ablakot a gomb zárja be. ",
    "handbook.en.validation": "A handbook for administrators. ",
    "handbook.de.validation": "Ein Handbuch für Verwalter. ",
}


@pytest.fixture
def benchmark(monkeypatch, tmp_path, toy_base):
    """Arguments of a smoke run over small corpora."""
    monkeypatch.syspath_prepend(FOLDER)
    text = tmp_path / "text"
    text.mkdir()
    for name, sentence in CORPORA.items():
        with gzip.open(text / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": f"{number} {sentence}" * 8}) + "\n" for number in range(30))
    words = ["--smoke", "--base", str(toy_base), "--text", str(text), "--out", str(tmp_path / "method")]
    return [*words, "--experts", "3"]


def test_same_samples(benchmark, megatron_imported):
    import method
    import method_arms

    options = method.parser().parse_args(benchmark)
    settings, out = method.asked(options), options.out
    out.mkdir()
    (out / "common.yaml").write_text(json.dumps(method_arms.common(settings, out)))
    assert megatron_lpr(["preprocess", str(out / "common.yaml")]) == 0
    read = {}
    for name, arm in method_arms.arms(settings, [1234, 99], ["gamma", "rates", "experts"]).items():
        if arm.way == "none":
            continue
        recipe = method.recipe_of(arm, settings, out)
        sampler = ReplaySampler.of(Manifest.load(recipe.data.manifest), recipe.data, recipe.train.seed)
        batch = sampler.fill(0, recipe.train.steps * recipe.train.global_batch_size)
        kind = ("review" if arm.after else "post-pretraining", "other seed" if name.endswith("seed 99") else "")
        read.setdefault(kind, {})[name] = batch.tokens_BS
    assert {"dense", "LoRA", "MoE, all trained", "stage 1"} < set(read["post-pretraining", ""])
    for samples in read.values():
        first, *others = samples.values()
        for other in others:
            assert np.array_equal(first, other)
    dense = [read["post-pretraining", ""]["dense"], read["post-pretraining", "other seed"]["dense seed 99"]]
    assert not np.array_equal(*dense)


def test_smoke(benchmark, megatron_imported, capsys):
    """In one process; arms that have results already are not made again."""
    pytest.importorskip("peft", reason="the LoRA arm needs peft")
    import method

    options = method.parser().parse_args(benchmark)
    settings, out = method.asked(options), options.out
    wanted = method.arms(settings, [1234], [])
    out.mkdir()
    (out / "common.yaml").write_text(json.dumps(method.common(settings, out)))
    assert megatron_lpr(["preprocess", str(out / "common.yaml")]) == 0
    for name in ("base", "LoRA", "stage 1", "review"):
        method.run(wanted[name], settings, out)
    text = method.tables(wanted, settings, out)
    found = json.loads((out / "results.json").read_text())["arms"]
    assert set(found) == {"base", "LoRA", "stage 1", "review"}
    assert found["base"]["summary"]["new languages, trained domain"] == 0
    bits = {name: arm["bits_per_byte"]["lohelp.hu"] for name, arm in found.items()}
    gain = 100 * (1 - bits["stage 1"] / bits["base"])
    assert found["stage 1"]["summary"]["new languages, trained domain"] == pytest.approx(gain)
    assert f"| stage 1 | {gain:.1f}% |" in text
    kept = 100 * found["base"]["bits_per_byte"]["handbook.de"] / found["review"]["bits_per_byte"]["handbook.de"]
    assert found["review"]["summary"]["never replayed, another domain"] == pytest.approx(kept)
    assert found["LoRA"]["cost"]["trained_parameters"] > 0 and found["stage 1"]["cost"]["flops"] > 0
    assert (out / "comparison.png").stat().st_size > 0
    assert method.run_all({name: wanted[name] for name in found}, out, 1, ["false"]) == []
    assert method.run_all({"dense": wanted["dense"]}, out, 1, ["false"]) == ["dense"]


def test_other_settings_are_refused(benchmark, tmp_path):
    import method

    from megatron_lpr.errors import UserError

    settings = method.asked(method.parser().parse_args(benchmark))
    method.check_same(settings, tmp_path / "out")
    method.check_same(settings, tmp_path / "out")
    other = method.asked(method.parser().parse_args([*benchmark, "--gamma", "2"]))
    with pytest.raises(UserError, match="another gamma"):
        method.check_same(other, tmp_path / "out")
