"""Frozen weights of FP8 layers are cast once in a run, and with `fp8.frozen_weights: fp8` are nothing but that cast."""

import dataclasses

import pytest
import te_on_cpu
import torch
from fp8_casts import bytes_of_casts, is_quantised
from harness import make_plan
from layouts import recipe_of, trainer_of, unfair_batch
from safetensors.torch import load_file
from te_on_cpu import called

from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.checkpoint.source import source_identity
from megatron_lpr.conversion.export.export import export_checkpoint
from megatron_lpr.errors import UserError
from megatron_lpr.planning.planned import planned
from megatron_lpr.testing.toy_models import write_toy_model

NUMBERS = ("ntp_loss", "balance_loss", "lpr_loss", "grad_norm")
# (frozen weights, those of them whose layer has a gradient of its input to compute): of two layers with two linear
# modules in the attention and two in the frozen expert, the lower one asks for none; in stage 2 the four new experts
# join in, and even the lower layer's fc2 lie above a router
FROZEN = {"stage1": (8, 4), "stage2": (24, 16)}
MIXTRAL_TO_LLAMA = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("toy") / "base", hidden_size=64, intermediate_size=96)


def fp8(numbers: str, held_in: str, **model) -> dict:
    return {
        "model": {"spec": "te", "dtype": "bfloat16"} | model,
        "fp8": {"recipe": numbers, "frozen_weights": held_in},
    }


def frozen(trainer) -> list[torch.Tensor]:
    """Frozen weights of linear modules inside of layers."""
    parts = ("self_attention", "experts")
    weights = [weight for name, weight in trainer.chunks[0].named_parameters() if any(part in name for part in parts)]
    return [weight for weight in weights if weight.ndim == 2 and not weight.requires_grad]


@pytest.fixture(scope="session")
def stage1(megatron_imported, base, tmp_path_factory):
    """The checkpoint of a stage 1 whose frozen weights were held in FP8."""
    from megatron_lpr.platform import megatron

    output = tmp_path_factory.mktemp("stage1")
    with megatron():
        trainer = trainer_of(base, "stage1", output, fp8("tensorwise", "fp8") | {"train": {"steps": 2}})
        trainer.train_step()
        trainer.train_step()
        return trainer.save()


def stage(name, base, stage1, output, changes):
    """A trainer of a stage, of the second one on the checkpoint of the first."""
    from megatron_lpr.training.train import Trainer

    if name == "stage1":
        return trainer_of(base, name, output, changes)
    changes = changes | {"model": changes["model"] | {"load": str(stage1)}}
    plan = make_plan(recipe_of(base, name, output, changes), unfair_batch(), source=stage1)
    trainer = Trainer(dataclasses.replace(plan, origin=source_identity(stage1)))
    for chunk in trainer.chunks:
        chunk.train()
    return trainer


@pytest.mark.parametrize("name, numbers", [("stage1", "tensorwise"), ("stage2", "blockwise")])
def test_cast_once_and_the_same_numbers(megatron, monkeypatch, base, stage1, tmp_path, name, numbers):
    from megatron_lpr.platform import leave_layout
    from megatron_lpr.training import train

    steps, casts, transposed = {}, {}, {}
    for how in ("every step", "bf16", "fp8"):
        with monkeypatch.context() as patch:
            if how == "every step":  # as Megatron does it
                patch.setattr(train, "cast_frozen_once", lambda settings, chunks: None)
            changes = fp8(numbers, "fp8" if how == "fp8" else "bf16")
            trainer = stage(name, base, stage1, tmp_path / how, changes)
        steps[how], casts[how], transposed[how] = [], [], []
        for _ in range(3):
            te_on_cpu.reset_calls()
            metrics = trainer.train_step()
            steps[how].append([metrics[number] for number in NUMBERS])
            casts[how].append(called()["quantize"])
            transposed[how].append(called().get("fp8_transpose", 0))
        weights = frozen(trainer)
        assert all(is_quantised(weight) == (how == "fp8") for weight in weights)
        if how != "every step":
            memory, _ = planned(trainer.recipe, trainer.plan.arch, 1, 0)
            assert memory.casts == bytes_of_casts(trainer)
            parameters = [p for p in trainer.chunks[0].parameters() if not p.requires_grad and not is_quantised(p)]
            assert memory.frozen == sum(p.nbytes for p in parameters)
        if how == "fp8":
            both = sum(weight.get_data_tensors()[1] is not None for weight in weights)
        del trainer
        leave_layout()
    number, backward = FROZEN[name]
    assert len(weights) == number
    assert steps["bf16"] == steps["fp8"] == steps["every step"]
    every = casts["every step"][0]
    assert casts["every step"] == [every] * 3
    assert casts["bf16"] == [every, every - number, every - number]
    assert casts["fp8"] == [every - number] * 3
    assert transposed["fp8"] == [backward, 0, 0] and both == backward


def test_layers_in_bfloat16_keep_their_weights(megatron, base, tmp_path):
    changes = fp8("tensorwise", "fp8")
    changes["fp8"]["bf16_layers_at_start"] = 1
    trainer = trainer_of(base, "stage1", tmp_path, changes)
    kinds = {
        (name.partition("layers.")[2][0], is_quantised(weight))
        for name, weight in trainer.chunks[0].named_parameters()
        if "layers." in name and weight.ndim == 2 and not weight.requires_grad
    }
    assert kinds == {("0", False), ("1", True)}


def test_a_resumed_run_has_the_same_bits(megatron, base, tmp_path):
    from megatron_lpr.platform import leave_layout

    changes = fp8("blockwise", "fp8")
    trainer = trainer_of(base, "stage1", tmp_path, changes)
    trainer.train_step()
    folder = trainer.save()
    values = [weight.get_data_tensors()[0].clone() for weight in frozen(trainer)]
    expected = [trainer.train_step()[number] for number in NUMBERS]
    del trainer
    leave_layout()
    assert read_run_state(folder).content == "over base"
    resumed = trainer_of(base, "stage1", tmp_path, changes, resume=folder)
    for weight, value in zip(frozen(resumed), values, strict=True):
        assert torch.equal(weight.get_data_tensors()[0], value)
    assert [resumed.train_step()[number] for number in NUMBERS] == expected


def test_exports_have_the_base_byte_for_byte(megatron, base, stage1, tmp_path):
    """The frozen expert and attention are the base's, the new experts those of stage 1; none was read from memory."""
    trainer = stage("stage2", base, stage1, tmp_path / "stage2", fp8("tensorwise", "fp8") | {"train": {"steps": 1}})
    trainer.train_step()
    last = trainer.save()
    assert read_run_state(stage1).content == "over base" and read_run_state(last).content == "over checkpoint"
    exports = []
    for checkpoint in (stage1, last):
        export_checkpoint(checkpoint, tmp_path / checkpoint.name, base_dir=base)
        exports.append(load_file(tmp_path / checkpoint.name / "model.safetensors"))
    originals, found = load_file(base / "model.safetensors"), set()
    first, second = exports
    for name, tensor in second.items():
        assert torch.equal(tensor, first[name]) != name.endswith("moe.gate.weight"), name
        original = name
        for mixtral, llama in MIXTRAL_TO_LLAMA.items():
            original = original.replace(f"block_sparse_moe.experts.0.{mixtral}.", f"mlp.{llama}.")
        if original in originals:
            found.add(original)
            assert torch.equal(tensor, originals[original].bfloat16()), name
    assert found == set(originals)


@pytest.mark.parametrize("part", ["values", "transposed", "scale"])
def test_a_changed_weight_is_found(megatron, base, tmp_path, part):
    from megatron_lpr.training.hooks.frozen_weights import FrozenWeights

    trainer = trainer_of(base, "stage1", tmp_path, fp8("tensorwise", "fp8"))
    hook = FrozenWeights(trainer.chunks)
    trainer.train_step()
    hook.before_save(trainer)
    weight = next(weight for weight in frozen(trainer) if weight.get_data_tensors()[1] is not None)
    values, transposed = weight.get_data_tensors()
    {"values": values, "transposed": transposed, "scale": weight._scale_inv}[part].view(torch.uint8)[..., 0] += 1
    with pytest.raises(UserError, match="the frozen weight"):
        hook.before_save(trainer)


def test_held_out_text_is_scored_between_steps(megatron, base, tmp_path):
    from megatron_lpr.platform import leave_layout
    from megatron_lpr.training.hooks.validation import evaluating

    found = []
    for validates in (False, True):
        trainer = trainer_of(base, "stage1", tmp_path / str(validates), fp8("tensorwise", "fp8"))
        trainer.train_step()
        if validates:
            te_on_cpu.reset_calls()
            with evaluating(trainer.chunks) as (model,), torch.no_grad():
                tokens = torch.arange(7)[None]  # as many as no FP8 product takes
                model(tokens, torch.arange(7)[None], None)
            assert "quantize" not in called()
        found.append([trainer.train_step()[number] for number in NUMBERS])
        leave_layout()
    assert found[0] == found[1]
