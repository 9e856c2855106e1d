"""Which fused kernels a model has, and that Apex's add the gradients that PyTorch computes."""

from dataclasses import replace

import pytest
import torch
from apex_stand_in import apex
from harness import gradients, unwrapped
from layouts import recipe_of, trainer_of, write_source

from megatron_lpr.families import read_architecture
from megatron_lpr.testing.toy_models import write_toy_model


@pytest.fixture
def installed(megatron, monkeypatch):
    """On a GPU, with all of Transformer Engine's kernels."""
    from megatron.core.extensions import transformer_engine

    from megatron_lpr.model import fused_kernels

    for name in ("fused_topk_with_score_function", "fused_apply_rotary_pos_emb", *fused_kernels._PERMUTATION):
        monkeypatch.setattr(transformer_engine, name, object(), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return fused_kernels.fused_kernels


@pytest.fixture
def looped(megatron, monkeypatch):
    """New experts as on GPUs where Apex's kernels add their gradients: one after the other."""
    from megatron_lpr.model import grouped_experts

    monkeypatch.setattr(grouped_experts, "computes_at_once", lambda config: False)


@pytest.mark.parametrize(
    "sections, permutation",
    [
        ({}, True),
        ({"model": {"topk": 1}}, False),  # all of a token's slots may be the frozen expert's
        ({"model": {"num_frozen_experts": 2}}, False),
        ({"parallel": {"dispatcher": "allgather"}}, False),
    ],
)
def test_no_kernel_is_given_no_rows(installed, toy_base, tmp_path, sections, permutation):
    found = installed(recipe_of(toy_base, "stage1", tmp_path, sections), read_architecture(toy_base), te=True)
    assert found.router and found.rope and found.permutation == permutation


def test_without_them(installed, toy_base, tmp_path, monkeypatch):
    from megatron.core.extensions import transformer_engine

    recipe, arch = recipe_of(toy_base, "stage1", tmp_path, {}), read_architecture(toy_base)
    assert not any(vars(installed(recipe, arch, te=False)).values())
    off = recipe_of(toy_base, "stage1", tmp_path, {"model": {"fused_kernels": "off"}})
    assert not any(vars(installed(off, arch, te=True)).values())
    monkeypatch.setattr(transformer_engine, "fused_unpermute", None)
    assert vars(installed(recipe, arch, te=True)) == {"router": True, "permutation": False, "rope": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not any(vars(installed(recipe, arch, te=True)).values())


def test_no_kernel_of_rope_for_channels_side_by_side(installed, tmp_path, monkeypatch):
    """Megatron 0.16 does not tell the one that keeps documents apart; it would turn other channels without a word."""
    from megatron_lpr.model import transformer_config as module

    def rope_alone(recipe, arch, te):
        return replace(installed(recipe, arch, te=True), router=False, permutation=False)

    helium = {"architectures": ["HeliumForCausalLM"], "model_type": "helium", "head_dim": 16}
    monkeypatch.setattr(module, "fused_kernels", rope_alone)
    base = write_toy_model(tmp_path / "base", **helium)
    recipe = recipe_of(base, "stage1", tmp_path, {})
    config = module.transformer_config(recipe, read_architecture(base), te=False)
    assert config.rotary_interleaved and not config.apply_rope_fusion


@pytest.mark.parametrize("stage", ["stage1", "stage2", "moe_full"])
def test_apex_adds_the_same_gradients(looped, toy_base, tmp_path, monkeypatch, stage):
    from megatron_lpr.model.fused_kernels import description
    from megatron_lpr.platform import leave_layout

    source = write_source(toy_base, tmp_path / "source")
    leave_layout()
    plain = trainer_of(toy_base, stage, tmp_path / "plain", source=source)
    expected = [plain.train_step()["grad_norm"], plain.train_step()["grad_norm"]]
    expected_gradients = {name: gradient.clone() for name, gradient in gradients(plain).items()}
    assert "fused kernels: none; Adam of PyTorch" == description(plain.chunks)
    del plain
    leave_layout()
    with apex(monkeypatch) as shapes:
        trainer = trainer_of(toy_base, stage, tmp_path / "fused", source=source)
        assert [trainer.train_step()["grad_norm"] for _ in range(2)] == pytest.approx(expected, rel=1e-5)
        found = gradients(trainer)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert ("gradient accumulation" in description(trainer.chunks)) == bool(shapes) == (stage != "stage2")
        own = {gradient.shape for gradient in found.values()}
        assert set(shapes) <= own


@pytest.mark.parametrize("distributed", [True, False])
def test_apex_updates_and_resumes(looped, toy_base, tmp_path, monkeypatch, distributed):
    """Its Adam counts steps in the group where PyTorch's does in each state."""
    from megatron_lpr.model.fused_kernels import description
    from megatron_lpr.platform import leave_layout

    def losses(trainer, steps=2):
        return [trainer.train_step()["ntp_loss"] for _ in range(steps)]

    changes = {"parallel": {"distributed_optimizer": distributed}, "checkpoint": {"final_optimizer": True}}
    expected = losses(trainer_of(toy_base, "stage1", tmp_path / "plain", changes), 3)
    leave_layout()
    with apex(monkeypatch):
        trainer = trainer_of(toy_base, "stage1", tmp_path, changes)
        assert description(trainer.chunks).endswith("Adam of Apex")
        first = losses(trainer, 1)
        trainer.save()
        rest = losses(trainer)
        assert [*first, *rest] == pytest.approx(expected, rel=1e-4)
        del trainer
        leave_layout()
        resumed = trainer_of(toy_base, "stage1", tmp_path, changes, resume=tmp_path / "checkpoints/step_00000001")
        assert losses(resumed) == rest


def test_only_weights_that_train_alone(looped, toy_base, tmp_path, monkeypatch):
    from megatron_lpr.model.fused_gradients import fuse_gradient_accumulation
    from megatron_lpr.model.grouped_experts import GroupedExperts

    def fused(trainer):
        modules = [(n, m) for n, m in trainer.chunks[0].named_modules() if hasattr(m, "gradient_accumulation_fusion")]
        return {name for name, module in modules if module.gradient_accumulation_fusion}

    with apex(monkeypatch):
        trainer = trainer_of(toy_base, "stage1", tmp_path)
        assert fused(trainer) and all(".mlp.experts.local_experts." in name for name in fused(trainer))
        for module in trainer.chunks[0].modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = False
        for module in trainer.chunks[0].modules():
            if isinstance(module, GroupedExperts):
                module.is_grouped = True
        fuse_gradient_accumulation(trainer.chunks)
        assert not fused(trainer)


def test_transformer_engines_modules():
    from megatron_lpr.model.fused_gradients import fuse_gradient_accumulation

    class Linear(torch.nn.Module):
        fuse_wgrad_accumulation = False

        def __init__(self, *trains: bool) -> None:
            super().__init__()
            for number, train in enumerate(trains):
                setattr(self, f"weight{number}", torch.nn.Parameter(torch.ones(1), requires_grad=train))

    linears = [Linear(True, True), Linear(False, False), Linear(True, False), Linear()]
    fuse_gradient_accumulation([torch.nn.ModuleList(linears)])
    assert [linear.fuse_wgrad_accumulation for linear in linears] == [True, False, False, False]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_first_router_learns_where_no_token_has_a_gradient(megatron, toy_base, tmp_path, monkeypatch, stage):
    """Transformer Engine's permutation gives probabilities a gradient only beside one of the tokens, as done here."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_lpr.platform import leave_layout

    source = write_source(toy_base, tmp_path / "source")
    leave_layout()

    def as_fused(plain):
        def permuted(tokens, *args, **kwargs):
            assert kwargs.pop("fused")
            rows, probs, *others = plain(tokens, *args, **kwargs)
            return rows, probs if tokens.requires_grad or probs is None else probs.detach(), *others

        return permuted

    def back(*args, fused, **kwargs):
        return unpermute(*args, **kwargs)

    found, unpermute = [], token_dispatcher.unpermute
    for fused in (False, True):
        trainer = trainer_of(toy_base, stage, tmp_path / str(fused), source=source)
        if fused:
            for name in ("permute", "sort_chunks_by_idxs"):
                monkeypatch.setattr(token_dispatcher, name, as_fused(getattr(token_dispatcher, name)))
            monkeypatch.setattr(token_dispatcher, "unpermute", back)
            for layer in unwrapped(trainer).decoder.layers:
                layer.mlp.config.moe_permute_fusion = True
        trainer.train_step()
        found.append({name: gradient.clone() for name, gradient in gradients(trainer).items()})
        leave_layout()
    plain, fused = found
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
