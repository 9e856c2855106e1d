"""Benchmarks by lm-evaluation-harness: names, what it is asked for, results and their table."""

import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_lpr import cli
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.task_names import FLORES_CODES, tasks_of
from megatron_lpr.evaluation.tasks import TaskResult, TaskScore, task_rows
from megatron_lpr.testing.toy_models import write_recipe, write_toy_tokenizer

# of lm-evaluation-harness 0.4.13
KNOWN = {
    *("arc_challenge", "arc_hu", "arc_challenge_mt_hu", "arc_challenge_mt_el", "hellaswag", "hellaswag_hu", "mmlu"),
    *("m_mmlu_hu", "global_mmlu_full_tr", "belebele_hun_Latn", "belebele_tur_Latn", "belebele_eng_Latn"),
    *("catalan_bench_flores_ca-en", "catalan_bench_flores_en-ca", "catalan_bench_flores_ca-de"),
    *("flores_swh_Latn-eng_Latn_prompt_1", "flores_eng_Latn-swh_Latn_prompt_1", "flores_swh_Latn-eng_Latn_prompt_2"),
}
NAMES = [
    ("arc", "en", ["arc_challenge"]),
    ("arc", "hu", ["arc_hu"]),
    ("arc", "el", ["arc_challenge_mt_el"]),
    ("hellaswag", "en", ["hellaswag"]),
    ("mmlu", "en", ["mmlu"]),
    ("mmlu", "hu", ["m_mmlu_hu"]),
    ("mmlu", "tr", ["global_mmlu_full_tr"]),
    ("belebele", "en", ["belebele_eng_Latn"]),
    ("belebele", "hun_Latn", ["belebele_hun_Latn"]),
    ("flores", "ca", ["catalan_bench_flores_ca-en", "catalan_bench_flores_en-ca"]),
    ("flores", "sw", ["flores_swh_Latn-eng_Latn_prompt_1", "flores_eng_Latn-swh_Latn_prompt_1"]),
]


@pytest.mark.parametrize(("benchmark", "language", "names"), NAMES)
def test_names(benchmark, language, names):
    found, missing = tasks_of([benchmark], {language: "original"}, KNOWN)
    assert [task.name for task in found] == names and not missing
    assert {(t.benchmark, t.language, t.role) for t in found} == {(benchmark, language, "original")}


def test_what_is_not_there():
    found, missing = tasks_of(["arc", "flores"], {"hu": "expanded", "ca": "original"}, KNOWN)
    assert len(found) == 3 and missing == ["flores in hu", "arc in ca"]
    with pytest.raises(UserError, match="no benchmark 'belebelle'; did you mean 'belebele'"):
        tasks_of(["belebelle"], {"hu": "expanded"}, KNOWN)
    with pytest.raises(UserError, match="none of them in the language 'xx'; valid: el, en, hu"):
        tasks_of(["arc"], {"xx": "expanded"}, KNOWN)


def test_the_installed_harness_has_these_names():
    tasks = pytest.importorskip("lm_eval.tasks", reason="pip install 'megatron-lpr[harness]'")
    known = set(tasks.TaskManager().all_tasks)
    assert known >= KNOWN
    without = [code for code in FLORES_CODES if code != "gl" and f"belebele_{FLORES_CODES[code]}" not in known]
    assert not without


@pytest.fixture
def harness(monkeypatch):
    """A stand-in; `asked` is what it was asked for. A score is a hundredth of the length of the task's name."""
    asked = []

    def simple_evaluate(*, model, tasks, **options):
        asked.append((model, *tasks, options["num_fewshot"]))
        if "broken" in model:
            raise ConnectionError("no\nnetwork")
        score = len(tasks[0]) / 100
        return {"results": {tasks[0]: {"alias": "x", "acc,none": score, "acc_norm,none": 2 * score}}}

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")}
    modules["lm_eval"].__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.tasks"].TaskManager = lambda: SimpleNamespace(all_tasks=sorted(KNOWN))
    modules["lm_eval.models"] = ModuleType("lm_eval.models")
    modules["lm_eval.models.huggingface"].HFLM = lambda pretrained, **options: pretrained
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


@pytest.fixture
def evaluate(tmp_path, capsys):
    """evaluate(folder, tasks): exit status, output and errors."""
    corpora = [{"name": lang, "files": ["none"], "language": lang, "role": role} for lang, role in ROLES.items()]
    recipe = write_recipe(tmp_path / "recipe.yaml", {"evaluation": {"corpora": corpora}})

    def run(folder, tasks, *more, tokenizer_config=None):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.json").write_text("{}")
        write_toy_tokenizer(tmp_path / folder)
        if tokenizer_config:
            config = {"eos_token": "<eos>", **tokenizer_config}
            (tmp_path / folder / "tokenizer_config.json").write_text(json.dumps(config))
        words = [tmp_path / folder, "--recipe", recipe, "--tasks", tasks, "--name", folder]
        words += ["--out", tmp_path / f"{folder}.json", *more]
        return (cli.main(["evaluate", *map(str, words)]), *capsys.readouterr())

    return run


ROLES = {"en": "original", "hu": "expanded"}


def test_scores_and_their_table(harness, evaluate, tmp_path, capsys):
    status, out, err = evaluate("base", "arc,flores,belebele", "--dry-run")
    assert status == 0 and "on arc_challenge, belebele_eng_Latn, arc_hu, belebele_hun_Latn into" in out and not harness
    status, out, err = evaluate("base", "arc,flores,belebele")
    assert status == 0 and "does not have flores in en, flores in hu; left out" in err
    assert [asked[1:] for asked in harness] == [
        *(("arc_challenge", 25), ("belebele_eng_Latn", 5), ("arc_hu", 25), ("belebele_hun_Latn", 5))
    ]
    assert "| arc_challenge     | en       | original | 0.260 |" in out
    assert "Higher is better: arc acc_norm, 25-shot, belebele acc, 5-shot." in out
    tree = json.loads((tmp_path / "base.json").read_text())
    tree["model"] = "stage 2"
    for task in tree["tasks"]:
        task["score"] /= 2
    (tmp_path / "stage2.json").write_text(json.dumps(tree))
    assert cli.main(["compare", str(tmp_path / "base.json"), str(tmp_path / "stage2.json")]) == 0
    table = capsys.readouterr().out
    assert "stage 2 vs base" in table and table.count(" 50.0% kept |") == 2 and " -0.060 |" in table
    tree["bos"] = not tree["bos"]
    (tmp_path / "stage2.json").write_text(json.dumps(tree))
    assert cli.main(["compare", str(tmp_path / "base.json"), str(tmp_path / "stage2.json")]) == 2
    assert "are of prompts that open otherwise" in capsys.readouterr().err
    tree["tasks"].pop()
    (tmp_path / "stage2.json").write_text(json.dumps(tree))
    assert cli.main(["compare", str(tmp_path / "base.json"), str(tmp_path / "stage2.json")]) == 2
    assert "are not of the same tasks" in capsys.readouterr().err


def test_of_a_score_of_zero_nothing_can_be_kept():
    its = {"benchmark": "arc", "language": "en", "role": "original", "name": "arc_challenge", "metric": "acc"}
    base, later, few = (
        TaskResult(model=model, tasks=(TaskScore(**its, shots=shots, score=score),), bos=True)
        for model, shots, score in (("base", 25, 0.0), ("stage 1", 25, 0.1), ("few", 5, 0.1))
    )
    assert task_rows([base, later])[1][-1] == "+0.100"
    with pytest.raises(UserError, match="are not of the same tasks"):
        task_rows([base, few])


@pytest.mark.parametrize("bos, opens", [("auto", True), ("true", True), ("false", False)])
def test_prompts_open_as_documents_do(harness, evaluate, monkeypatch, bos, opens):
    options = {}
    monkeypatch.setattr(
        sys.modules["lm_eval.models.huggingface"], "HFLM", lambda pretrained, **its: options.update(its) or pretrained
    )
    tokenizer_config = {"bos_token": "<eos>", "add_bos_token": True}
    assert evaluate("base", "arc", "--set", f"preprocess.bos={bos}", tokenizer_config=tokenizer_config)[0] == 0
    assert options["add_bos_token"] == opens


def test_what_cannot_be_done(harness, evaluate, tmp_path, monkeypatch):
    assert "cannot run arc_challenge (ConnectionError: no network)" in evaluate("broken", "arc")[2]
    assert "no benchmark 'ark'; did you mean 'arc'" in evaluate("base", "ark")[2]
    monkeypatch.delitem(sys.modules, "lm_eval")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = evaluate("base", "arc")
    assert status == 2 and "--tasks: needs lm-evaluation-harness: pip install 'megatron-lpr[harness]'" in err
