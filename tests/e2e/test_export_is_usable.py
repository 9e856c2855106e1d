"""What users do with an export: read its card, text from stock transformers, and lm-evaluation-harness."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.data.corpus.manifest import Manifest

QUESTIONS = [("the wind", ["coin", "zsgyk"]), ("áé", ["íő", "the"]), ("dew", ["gyk", "don"]), ("íőűz", ["win", "sgy"])]
TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def stock(project, trained):
    folder = project.root / "hf_stage2"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_card_tells_what_the_trainer_wrote(project, trained):
    """Of both stages: their steps and losses, and the corpora that lie on the disk."""
    card = (project.root / "hf_stage2/README.md").read_text()
    for stage, trainable in (("stage1", "new_experts_and_routers"), ("stage2", "routers")):
        told = card.split(f"## {stage}")[1].split("\n## ")[0]
        assert f"Trained `{trainable}` for 6 steps (24 samples)" in told
        last = json.loads((project.root / stage / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == 6 and f"NTP {last['ntp_loss']:.4f}" in told
        state = read_run_state(project.root / stage / "checkpoints/step_00000006")
        for corpus in Manifest.load(str(project.root / "data/manifest.yaml")).corpora:
            digest = hashlib.sha256(Path(f"{corpus.prefix}.bin").read_bytes()).hexdigest()
            trained_on = state.tokens_per_language[corpus.language]
            row = (corpus.name, corpus.language, corpus.role, f"{corpus.tokens:,}", f"{trained_on:,}", f"`{digest}`")
            assert f"| {' | '.join(row)} |" in told
        assert sum(state.tokens_per_language.values()) == 24 * 32
    assert "N(0, 0.1) with seed 0" in card and "already spoke: qab." in card and "expanded to: qaa." in card


@torch.no_grad()
def test_text_is_generated(stock):
    model, tokenizer = stock
    ids = torch.tensor([tokenizer.encode("the wind in", add_special_tokens=False)])
    generated = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert generated.shape[1] == ids.shape[1] + 12 and tokenizer.decode(generated[0])
    # greedy: each token is the most probable one after those before it
    best = model(generated).logits.argmax(-1)[0, ids.shape[1] - 1 : -1]
    assert torch.equal(generated[0, ids.shape[1] :], best)


@torch.no_grad()
def log_likelihood(model, tokenizer, question, choice):
    context, answer = (tokenizer.encode(text, add_special_tokens=False) for text in (question, choice))
    log_p = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    return sum(log_p[len(context) + n - 1, token].item() for n, token in enumerate(answer))


def test_lm_evaluation_harness_gives_the_models_answers(stock, project, tmp_path, monkeypatch):
    reason = "lm-evaluation-harness is not installed: pip install 'megatron-lpr[harness]'"
    lm_eval = pytest.importorskip("lm_eval", reason=reason)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = stock
    likelihoods = [[log_likelihood(model, tokenizer, q, choice) for choice in choices] for q, choices in QUESTIONS]
    # one right answer fewer than there are questions
    answers = [max(range(2), key=scores.__getitem__) for scores in likelihoods]
    answers[0] = 1 - answers[0]
    rows = [{"question": q, "choices": c, "answer": a} for (q, c), a in zip(QUESTIONS, answers, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    harness = HFLM(pretrained=str(project.root / "hf_stage2"), device="cpu", dtype="float32", batch_size=2)
    results = lm_eval.simple_evaluate(
        model=harness, tasks=["toy_choice"], task_manager=TaskManager(include_path=str(tmp_path)), log_samples=True,
        bootstrap_iters=0,
    )  # fmt: skip
    assert results["results"]["toy_choice"]["acc,none"] == 1 - 1 / len(QUESTIONS)
    for sample, expected in zip(results["samples"]["toy_choice"], likelihoods, strict=True):
        assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
