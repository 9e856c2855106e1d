"""The card of an export tells what the files of its run tell."""

import json
import re
import shutil

import pytest
import yaml
from preprocessing import preprocess
from tiny_models import rewrite_config
from toy_run import write_run

from megatron_lpr.conversion.export.export import export_checkpoint, upcycle_hf
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.recipe.settings import ExportConfig
from megatron_lpr.recipe.text_settings import SourceConfig

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
        data_state={"version": 3, "consumed_samples": 8, "schedule": [], "corpora": corpora},
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
    assert "base_model" not in header and header["language"] == ["en", "hu"] and "moe" in header["tags"]
    for fact in (
        "3 experts", "top-2", "Expert 0 is the original", "N(0, 0.03) with seed 11",
        "Languages it already spoke: en.", "Languages it was expanded to: hu.",
        "`new_experts_and_routers` for 4 steps (8 samples) with NTP + 0.02 · balance",
        "Losses of the last step: NTP 1.0000, balance 1.2500.",
        f"| books | hu | expanded | 1,234,567 | 4,000 | `{'a' * 64}` |",
        "`routers` for 4 steps (8 samples) with NTP + 0.1 · LPR",
        "80.0% kept", "-1.000", "in float32", reports[0].frozen_sha256, "    x y",
    ):  # fmt: skip
        assert fact in card, fact
    assert card.index("## stage1") < card.index("## stage2") < card.index("## Results")


def test_results_that_are_not_there(two_stages, toy_base, tmp_path):
    settings = ExportConfig(results=(str(tmp_path / "none.json"),))
    with pytest.raises(
        UserError,
        match="none.json: cannot be read: No such file or directory; give the JSON file that `megatron-lpr evaluate`",
    ):
        export_checkpoint(two_stages, tmp_path / "out", base_dir=toy_base, settings=settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [None, "", "{", '{"step": 4}\n', '[1]\n{"step": 4, "ntp_loss": 1.0}x', '{"step": 4, "ntp_loss": "low"}\n'],
)
def test_metrics_that_are_gone_or_broken_are_left_out(two_stages, toy_base, tmp_path, content):
    metrics = tmp_path / "stage1/metrics.jsonl"
    metrics.unlink() if content is None else metrics.write_text(content)
    card = (export_checkpoint(two_stages, tmp_path / "out", base_dir=toy_base) / "README.md").read_text()
    assert "## stage1" in card and "Losses" not in card


def test_upcycled_and_dense_models_were_not_trained(toy_base, tmp_path):
    card = (upcycle_hf(toy_base, tmp_path / "a", Expansion(num_experts=4, router_seed=5)) / "README.md").read_text()
    assert "4 experts" in card and "the function is the base's" in card and "seed 5" in card
    write_run(toy_base, tmp_path / "run", recipe={"model": {"base": str(toy_base), "num_experts": 0}})
    card = (export_checkpoint(tmp_path / "run", tmp_path / "b", base_dir=toy_base) / "README.md").read_text()
    assert "`base`, converted without training." in card and "moe" not in card and "post-trained" not in card


def test_a_model_that_was_expanded_again(toy_base, tmp_path):
    once = upcycle_hf(toy_base, tmp_path / "once", Expansion(num_experts=3))
    card = (upcycle_hf(once, tmp_path / "twice", Expansion(num_experts=5, num_frozen=3)) / "README.md").read_text()
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


def test_the_card_of_what_a_run_writes_today(toy_base, tmp_path):
    """Corpora that preprocessing made, the state that their sampler gives, a run.json as a checkpoint gets it."""
    lines = [{"text": f"dew on wind {n}", "lang": "en" if n % 3 else "ro"} for n in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"files": (str(tmp_path / "text.jsonl"),), "role": "expanded"}
    mixed = {"languages": {"ro": "expanded", "en": "original"}, "language_field": "lang"}
    manifest = preprocess(
        [
            SourceConfig(name="books", language="hu", **source),
            SourceConfig(name="web", language="ro", **source | mixed),
        ],
        tokenizer=str(toy_base),
        output=str(tmp_path / "data"),
    )
    sampler = ReplaySampler(manifest, seq_length=16, seed=0, mixture={"expanded": 1.0})
    read = {"data_state": sampler.state(8), "tokens_per_language": {"hu": 10, "ro": 20, "en": 3}}
    folder = write_run(toy_base, tmp_path / "run", recipe={"name": "stage1", **train("routers")}, **read)
    card = (export_checkpoint(folder, tmp_path / "out", base_dir=toy_base) / "README.md").read_text()
    books, web = manifest.corpora
    assert f"| books | hu | expanded | {books.tokens:,} | 10 | `{books.digest}` |" in card
    assert f"| web | ro, en | expanded | {web.tokens:,} | 23 | `{web.digest}` |" in card
    assert "already spoke: en." in card and "expanded to: hu, ro." in card
    assert not re.search(r"``|\|  *\||None|null", card), card
    assert not re.search(r": *\.?$", card.split("---", 2)[2], re.M), card


def named(base, folder, name):
    return rewrite_config(shutil.copytree(base, folder), _name_or_path=name)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "a/b.c-d_e"])
def test_the_header_links_to_the_base_where_it_is_known(toy_base, tmp_path, name):
    out = upcycle_hf(named(toy_base, tmp_path / "base", name), tmp_path / "out", Expansion(num_experts=3))
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == name and f"# {name}, expanded" in card


@pytest.mark.parametrize("name", ["", None, 3, "base", "/data/models/base", "./a/b", "a/b/c", "checkpoints/", "../x"])
def test_the_header_names_no_folder(toy_base, tmp_path, name):
    out = upcycle_hf(named(toy_base, tmp_path / "base", name), tmp_path / "out", Expansion(num_experts=3))
    card = (out / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(card.split("---")[1]) and "# base, expanded" in card


def test_the_hubs_own_cache_tells(toy_base, tmp_path):
    base = named(toy_base, tmp_path / "models--Qwen--Qwen2.5-0.5B/snapshots/0123abcd", "someone/parent")
    card = (upcycle_hf(base, tmp_path / "out", Expansion(num_experts=3)) / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen2.5-0.5B"


def test_a_setting_names_the_base(two_stages, toy_base, tmp_path):
    settings = ExportConfig(base_model="me/model")
    card = export_checkpoint(two_stages, tmp_path / "out", base_dir=toy_base, settings=settings) / "README.md"
    assert yaml.safe_load(card.read_text().split("---")[1])["base_model"] == "me/model"
    with pytest.raises(UserError, match="export.base_model: 'model' is no hub id"):
        settings = ExportConfig(base_model="model")
        export_checkpoint(two_stages, tmp_path / "other", base_dir=toy_base, settings=settings)
    assert not (tmp_path / "other").exists()
