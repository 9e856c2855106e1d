"""Training in FP8 against bfloat16: every recipe, stage and kind of recomputation, and what stays out of it.

On a GPU, and on the emulation (`make test-te`), where the same tests show everything but the kernels.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_marks import EMULATED, ON_GPU_OR_EMULATION
from harness import gradients, unwrapped
from layouts import STAGES, trainer_of, write_source

from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.evaluation.windows import tokenized
from megatron_lpr.platform.to_host import ToHost
from megatron_lpr.recipe.text_settings import EvaluationCorpus
from megatron_lpr.testing.toy_models import write_toy_model

pytestmark = ON_GPU_OR_EMULATION
RECIPES = ("tensorwise", "blockwise")
# a token of few that goes to another expert, for a rounded router input, is much
NEAR = {"ntp_loss": 1e-2, "balance_loss": 5e-2, "lpr_loss": 0.1, "grad_norm": 0.25}
CORPUS = EvaluationCorpus(name="x", files=("x",), language="qab", role="original")
EVALUATION = {"window": 13, "batch": 1}  # no multiple of 16 tokens, as text has it


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("fp8") / "base", hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def source(base, tmp_path_factory):
    from megatron_lpr.platform import leave_layout, megatron

    with megatron():
        checkpoint = write_source(base, tmp_path_factory.mktemp("source"))
        leave_layout()
    return checkpoint


@pytest.fixture
def make(megatron, base, source, tmp_path):
    """A function that makes a trainer, and leaves the layout of the one before."""
    from megatron_lpr.platform import leave_layout

    def trainer(stage: str, recipe: str, *, recompute: str = "none", resume=None, **fp8: Any):
        leave_layout()
        changes = {
            "model": {"spec": "te", "dtype": "bfloat16"},
            "train": {"recompute": recompute},
            "fp8": {"recipe": recipe, **fp8},
        }
        output = tmp_path / f"{stage}_{recipe}"
        return trainer_of(base, stage, output, changes, source=None if resume else source, resume=resume)

    yield trainer
    leave_layout()


def first_step(trainer) -> tuple[dict, dict[str, torch.Tensor]]:
    return trainer.train_step(), {name: gradient.clone() for name, gradient in gradients(trainer).items()}


def numbers(metrics: dict) -> list:
    return [metrics[name] for name in NEAR]


def in_fp8(trainer) -> set[str]:
    """Linear modules whose last pass was in FP8, layers and experts by their numbers."""
    return {
        name
        for name, module in unwrapped(trainer).named_modules()
        if getattr(module, "fp8", False) and any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", STAGES)
def test_near_bfloat16_and_the_same_when_recomputed(make, stage, recipe):
    expected, _ = first_step(make(stage, "none"))
    got, gradients_got = first_step(make(stage, recipe))
    for name, tolerance in NEAR.items():
        assert got[name] == (expected[name] and pytest.approx(expected[name], rel=tolerance)), name
    assert got["grad_norm"] != expected["grad_norm"], "nothing was computed in FP8"
    for recompute in ("selective", "full"):
        again, gradients_again = first_step(make(stage, recipe, recompute=recompute))
        if EMULATED:
            assert numbers(again) == numbers(got), recompute
        for name, gradient in gradients_got.items():
            # a GPU adds up tokens in any order
            torch.testing.assert_close(gradients_again[name], gradient, rtol=0, atol=0 if EMULATED else 1e-2, msg=name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_goes_on_as_without_a_stop(make, recipe):
    trainer = make("stage1", recipe)
    trainer.train_step()
    trainer.save()
    expected = [numbers(trainer.train_step()) for _ in range(2)]
    resumed = make("stage1", recipe, resume=Path(trainer.plan.recipe.output) / "checkpoints/step_00000001")
    got = [numbers(resumed.train_step()) for _ in range(2)]
    assert got == (expected if EMULATED else [pytest.approx(step, rel=1e-2) for step in expected])


def test_linear_layers_are_in_fp8_and_nothing_else_is(make):
    trainer = make("stage1", "tensorwise", bf16_layers_at_start=1)
    trainer.train_step()
    attention = {f"decoder.layers.1.self_attention.linear_{name}" for name in ("qkv", "proj")}
    of_new = {f"decoder.layers.1.mlp.experts.linear_{name}" for name in ("fc1", "fc2")}
    of_frozen = {f"decoder.layers.1.mlp.frozen_experts.0.linear_{name}" for name in ("fc1", "fc2")}
    assert in_fp8(trainer) == attention | of_new | of_frozen
    for name, parameter in unwrapped(trainer).named_parameters():
        expected = torch.float32 if name.endswith("router.weight") else torch.bfloat16
        assert parameter.dtype is expected and type(parameter) is torch.nn.Parameter, name
    masters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert masters and all(master.dtype is torch.float32 for master in masters)


def test_held_out_text_is_scored_in_bfloat16_and_leaves_no_trace(make, base):
    from megatron_lpr.evaluation.forward import text_nats
    from megatron_lpr.training.hooks.validation import evaluating

    text = tokenized(load_tokenizer(str(base)), CORPUS, ["a text that is longer than sixteen tokens"])
    nats, steps = {}, {}
    for recipe, is_validated in (("none", True), ("blockwise", True), ("blockwise", False)):
        trainer = make("stage1", recipe)
        steps[is_validated] = []
        for _ in range(2):
            if is_validated:
                with evaluating(trainer.chunks) as chunks:
                    nats.setdefault(recipe, text_nats(chunks, [text], **EVALUATION))  # before the first step
                assert not in_fp8(trainer)
            steps[is_validated].append(numbers(trainer.train_step()))
            assert bool(in_fp8(trainer)) == (recipe != "none")
    assert nats["blockwise"] == nats["none"]
    assert steps[True] == (steps[False] if EMULATED else [pytest.approx(step, rel=1e-2) for step in steps[False]])


def test_a_frozen_expert_that_nobody_chose(make):
    from megatron.core.fp8_utils import get_fp8_context

    from megatron_lpr.model.frozen_expert import add_frozen_experts

    trainer = make("stage1", "tensorwise")
    model = unwrapped(trainer)
    experts = model.decoder.layers[0].mlp.frozen_experts
    device = next(model.parameters()).device
    x = torch.randn(32, 64, dtype=torch.bfloat16, device=device)
    for chosen in (0, 3, 16, 17, 32):
        mask = (torch.arange(32, device=device) < chosen)[:, None]
        with get_fp8_context(model.config, 0):
            output = add_frozen_experts(experts, ToHost(mask.sum(0)), x, mask.float(), mask)
        assert not output[chosen:].any() and output[:chosen].isfinite().all()
        assert bool(output[:chosen].any()) == bool(chosen)
