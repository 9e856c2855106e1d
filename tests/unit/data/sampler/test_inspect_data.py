"""megatron-lpr inspect-data: what it says is what the sampler gives."""

import re
import weakref

import pytest

from megatron_lpr import cli
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler import inspect_data
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.recipe.reading import load_recipe
from megatron_lpr.testing.toy_models import write_toy_project

SCHEDULE = "data.schedule=[{from_sample: 12, mixture: {expanded: 0.9999, original: 0.0001}}]"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Six steps of four samples of 32 positions, half of them original."""
    recipes = write_toy_project(tmp_path_factory.mktemp("project"))
    assert cli.main(["preprocess", str(recipes["upcycle"])]) == 0
    return recipes


@pytest.fixture
def inspect(recipes, capsys):
    """inspect(recipe, *arguments) -> what was printed"""

    def run(name: str, *arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        assert cli.main(["inspect-data", str(recipes[name]), *arguments]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def sampler_of(recipe) -> ReplaySampler:
    return ReplaySampler.of(Manifest.load(recipe.data.manifest), recipe.data, recipe.train.seed)


@pytest.mark.parametrize("steps", [None, 500])
def test_the_plan_counts_what_the_sampler_gives(inspect, recipes, steps):
    printed = inspect("stage2", "--set", SCHEDULE, *(["--steps", str(steps)] if steps else []))
    recipe = load_recipe(str(recipes["stage2"]), [SCHEDULE])
    sampler, samples = sampler_of(recipe), 4 * (steps or 6)
    counts = sampler.count(0, samples)
    assert f"{samples:,} samples, {counts.tokens:,} tokens" in printed
    assert "from sample 0 (step 1): qaa 50.0%, qab 50.0%" in printed
    assert "from sample 12 (step 4): qaa 99.9900%, qab 0.0100%" in printed
    for i, (language, role) in enumerate((("qaa", "expanded"), ("qab", "original"))):
        tokens = counts.tokens_per_language[language]
        share = f"{100 * tokens / counts.tokens:.1f}%"
        assert re.search(rf"^{role} +{tokens:,} +{share}$", printed, re.M)
        assert re.search(rf"^└─ {language} +{tokens:,} +{share}$", printed, re.M)
        drawn = sampler.samples_before(samples)[i]
        epochs = f"{drawn / sampler.num_windows(i):.3f}"
        assert re.search(rf"^   └─ {language} +{drawn:,} +{epochs} +{sampler.num_tokens(i):,}$", printed, re.M)


@pytest.mark.parametrize("windows, tokens", [("packed", "in an epoch"), ("document", "of the documents")])
def test_an_epoch_of_documents_leaves_out_their_ends(inspect, recipes, windows, tokens):
    settings = [f"data.windows={windows}", "data.seq_length=8"]
    sampler = sampler_of(load_recipe(str(recipes["stage1"]), settings))
    printed = inspect("stage1", *(word for setting in settings for word in ("--set", setting)))
    assert f"epochs  {'tokens ' + tokens:>18}\n" in printed and f" {sampler.num_tokens(0):,}\n" in printed
    of_an_epoch = int(sampler.fill(0, sampler.num_windows(0)).loss_mask_BS.sum())
    assert (of_an_epoch == sampler.num_tokens(0) - 1) == (windows == "packed")


def test_a_step_shows_the_text_it_reads(inspect, recipes):
    printed = inspect("stage2", "--step", "3")
    recipe = load_recipe(str(recipes["stage2"]))
    sampler, tokenizer = sampler_of(recipe), load_tokenizer(recipe.model.base)
    blocks = re.split(r"^sample (\d+): ", printed, flags=re.M)
    assert blocks[0] == "step 3: samples 8 to 11\n" and blocks[1::2] == ["8", "9", "10", "11"]
    for k, block in zip(range(8, 12), blocks[2::2], strict=True):
        pick = sampler.pick(k)
        corpus = sampler.manifest.corpora[pick.corpus]
        assert block.startswith(f"{corpus.name} ({corpus.language}, {corpus.role}), epoch 0, window {pick.window}")
        documents = re.findall(r"^  document \d+, tokens ([\d,]+) to ([\d,]+): (.*)$", block, re.M)
        text = tokenizer.decode(sampler.fill(k, 1).tokens_BS[0].tolist())
        assert "".join(shown.split() and shown.replace(" ", "") for *_, shown in documents) == text.replace(" ", "")
        lengths = [int(last.replace(",", "")) - int(first.replace(",", "")) + 1 for first, last, _ in documents]
        assert sum(lengths) == 32


def test_without_the_tokenizer_it_shows_token_ids(inspect, tmp_path):
    printed = inspect("stage2", "--step", "1", "--set", f"model.base={tmp_path}/none")
    assert "(token ids: no tokenizer at" in printed
    assert re.search(r"^  document \d+, tokens [\d,]+ to [\d,]+: \d+( \d+)+", printed, re.M)


@pytest.mark.parametrize(
    "recipe, setting, warning",
    [
        ("stage2", "data.schedule=[{from_sample: 23}]", None),
        ("stage2", "data.schedule=[{from_sample: 24}]", "schedule[0]: has no effect: it takes over at sample 24"),
        ("stage2", "data.replay.documents={original: 40}", None),
        ("stage2", "data.replay.documents={qab: 41}", "41, more than there are, so that all are read (qab has 40)"),
        ("stage2", "data.replay.tokens={original: 0.5}", None),
        ("stage1", "data.replay.tokens={original: 0.5}", "tokens.original: has no effect: the run reads nothing of it"),
    ],
)
def test_settings_that_the_run_has_nothing_from(inspect, recipe, setting, warning):
    printed = inspect(recipe, "--set", setting)
    assert ("warning: data." in printed) == bool(warning) and (warning or "") in printed


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("stage2", ["--step", "7"], "--step: 7 of 6 steps; choose 1 to 6"),
        ("stage2", ["--step", "0"], "choose 1 to 6"),
        ("stage2", ["--steps", "0"], "--steps: 0; at least 1"),
        ("stage2", ["--steps", f"{2**60 + 1}"], f"--steps: {2**60 + 1}; at least 1, at most {2**60}"),
        ("stage2", ["--steps", "2", "--step", "3"], "--steps 2: has no effect beside --step 3"),
        ("upcycle", [], "describes no training run"),
        ("stage2", ["--set", "data.manifest=nowhere"], "no manifest at nowhere"),
        ("stage2", ["--set", "data.replay.documents={qqab: 3}"], "no role or language 'qqab'; did you mean 'qab'"),
    ],
)
def test_mistakes_are_named(inspect, name, arguments, message):
    assert message in inspect(name, *arguments, status=2)


def test_a_step_keeps_no_corpus_open(inspect, monkeypatch):
    """It may read of more corpora than a process may have files open."""
    opened, there = [], []

    class Watched(inspect_data.IndexedCorpus):
        def __init__(self, prefix):
            super().__init__(prefix)
            opened.append(weakref.ref(self))
            there.append(sum(corpus() is not None for corpus in opened))

    monkeypatch.setattr(inspect_data, "IndexedCorpus", Watched)
    inspect("stage2", "--step", "3")
    assert len(there) == 4 and max(there) <= 2
