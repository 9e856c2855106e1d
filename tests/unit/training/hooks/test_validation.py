"""A validation leaves no trace in the trainer, and the run when that is asked to stop."""

import dataclasses

import pytest
import torch
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import Stopped
from megatron_lpr.evaluation.windows import tokenized
from megatron_lpr.platform import watchdog
from megatron_lpr.recipe.text_settings import EvaluationCorpus
from megatron_lpr.reporting.metrics_log import read_metrics

CORPUS = EvaluationCorpus(name="x", files=("x",), language="qab", role="original")


@pytest.fixture
def trainer(megatron, toy_base, tmp_path):
    """Validates after each of its four steps, in passes of one window."""
    from megatron_lpr.training.train import Trainer

    sections = {
        "train": {"trainable": "new_experts_and_routers", "steps": 4},
        "evaluation": {"every": 1, "window": 4, "batch": 1},
        "optimizer": {"lr": 1e-2},
    }
    text = tokenized(load_tokenizer(str(toy_base)), CORPUS, ["a text in several windows"])
    plan = make_plan(make_recipe(toy_base, mixed_batch(), tmp_path, sections), mixed_batch())
    return Trainer(dataclasses.replace(plan, held_out=(text,)))


def validation_of(trainer):
    from megatron_lpr.training.hooks.validation import Validation

    (hook,) = (hook for hook in trainer.hooks if isinstance(hook, Validation))
    return hook


def state(trainer):
    """What the next step begins with."""
    from megatron.core.utils import get_model_config

    chunk, config = trainer.chunks[0], get_model_config(trainer.chunks[0])
    return {
        "weights": [p.detach().clone() for p in chunk.parameters()],
        "gradients": [p.main_grad.clone() for p in chunk.parameters() if p.requires_grad],
        "statistics": [router.stats.take()[0] for router in trainer.routers],
        "generator": torch.get_rng_state(),
        "modes": [module.training for module in chunk.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in chunk.modules()],
        "config": [id(function) for function in (config.no_sync_func, config.finalize_model_grads_func)],
        "samples": trainer.consumed_samples,
    }


def test_the_next_step_begins_as_without_it(trainer):
    hook = validation_of(trainer)
    hook.start(trainer)
    trainer.train_step()
    before, metrics = state(trainer), {}
    hook.after_step(trainer, metrics)
    assert metrics["validation"]["retention"].keys() == {"qab"} and metrics["validation_seconds"] > 0
    torch.testing.assert_close(state(trainer), before, rtol=0, atol=0)


class Watch:
    """A watchdog that asks for the stop at a forward pass of the second step's validation."""

    def __init__(self, trainer):
        self.trainer, self.expected = trainer, []

    def expect(self, what, seconds, folder):
        self.expected.append(what)
        if self.expected.count("the validation after step 2") == 3:
            self.trainer.votes.say("stop")


def test_a_stop_is_honoured_at_the_next_forward_pass(trainer, monkeypatch, tmp_path):
    watch = Watch(trainer)
    monkeypatch.setattr(watchdog, "_watchdog", watch)
    with pytest.raises(Stopped):
        trainer.run()
    assert trainer.step == trainer.saved_step == 2
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert ["validation" in record for record in records] == [True, False]
    assert watch.expected.count("the validation after step 1") == 1 + 7  # a pass for each window, with its own time
    assert watch.expected.count("the validation after step 2") == 1 + 2
    after = watch.expected[len(watch.expected) - watch.expected[::-1].index("the validation after step 2") :]
    assert after[0] == "what follows step 2" and "the validation of the base" in watch.expected
