"""Every family in Megatron and back: the same function, the same bytes. One rank; layouts are in tests/distributed."""

import pytest
import torch
from harness import upcycle_base
from safetensors.torch import load_file
from tiny_models import (
    TINY,
    load_strictly,
    rewrite,
    rewrite_config,
    save_tiny,
    stock_logits,
    tokens_BS,
    train_a_little,
)

from megatron_lpr.conversion.export.export import export_model, upcycle_hf
from megatron_lpr.conversion.verify.verify import verify_export
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe

ONE_OF_EACH = ("llama", "mistral_window", "qwen2", "qwen3", "helium", "olmo2")


def megatron_model(base, **model):
    from megatron.core import parallel_state

    from megatron_lpr.evaluation.megatron_model import MegatronModel

    parallel_state.destroy_model_parallel()  # a model before this one may have made groups
    tree = {"name": "test", "output": "none", "model": {"base": str(base), **model}}
    return MegatronModel(from_tree(Recipe, tree, where="test"), upcycle_base)


def export(model, out, **experts):
    base = model.recipe.model.base
    return export_model(model.module.named_parameters(), model.arch, Expansion(**experts), base_dir=base, out_dir=out)


@pytest.mark.parametrize("name", TINY)
def test_dense_and_upcycled_logits_are_transformers(megatron, tmp_path, name):
    base = save_tiny(name, tmp_path / "base")
    expected = stock_logits(base)
    for model in (
        megatron_model(base),
        megatron_model(base, num_experts=5, num_frozen_experts=2, topk=3, router_init_std=1.0),
    ):
        torch.testing.assert_close(model.logits(tokens_BS()), expected, rtol=0, atol=1e-5)
    # without what this variant is there for it would be another function: these tests can see it
    control = {"sliding_window": 100} if name in ("mistral_window", "phi3") else None
    if "linear" in name or "other_llama3" in name:
        control = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 1e4}
    if control:
        assert (stock_logits(rewrite_config(base, **control)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", TINY)
def test_distinct_experts_logits_are_transformers(megatron, tmp_path, name):
    """As training leaves them: in Megatron, under transformers, and exported again, byte for byte."""
    base = save_tiny(name, tmp_path / "base")
    upcycled = rewrite(upcycle_hf(base, tmp_path / "moe", Expansion(num_experts=4)), train_a_little)
    model = megatron_model(upcycled, num_experts=4)
    expected = stock_logits(upcycled)
    torch.testing.assert_close(model.logits(tokens_BS()), expected, rtol=0, atol=1e-4)
    assert (expected - stock_logits(base)).abs().max() > 0.1
    again = export(model, tmp_path / "again", num_experts=4, num_frozen=1)
    tensors, expected = (load_file(folder / "model.safetensors") for folder in (again, upcycled))
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert (again / "config.json").read_bytes() == (upcycled / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_layers_without_experts(megatron, tmp_path, name):
    """There and back: kept dense on upcycling, read as such, and no layer of another function."""
    base = save_tiny(name, tmp_path / "base", num_hidden_layers=3)
    layers = {"num_experts": 3, "mlp_only_layers": [0, 2]}
    upcycled = megatron_model(base, **layers, router_init_std=1.0)
    assert [hasattr(layer.mlp, "router") for layer in upcycled.module.decoder.layers] == [False, True, False]
    torch.testing.assert_close(upcycled.logits(tokens_BS()), stock_logits(base), rtol=0, atol=1e-5)
    moe = rewrite(export(upcycled, tmp_path / "moe", num_experts=3, num_frozen=1), train_a_little)
    assert verify_export(moe, base).ok, str(verify_export(moe, base))
    read = megatron_model(moe, num_experts=3)
    assert read.arch.mlp_only_layers == (0, 2)
    torch.testing.assert_close(read.logits(tokens_BS()), stock_logits(moe), rtol=0, atol=1e-4)


class TestSecondRound:
    """A model that has experts is expanded again: all of them frozen, new ones beside them (expansion.py)."""

    AGAIN = {"num_experts": 6, "num_frozen_experts": 4}

    @pytest.fixture(params=ONE_OF_EACH)
    def name(self, request):
        return request.param

    def test_equal_experts_compute_the_same(self, megatron, tmp_path, name):
        base = save_tiny(name, tmp_path / "base")
        once = upcycle_hf(base, tmp_path / "once", Expansion(num_experts=4, router_std=1.0))
        twice = megatron_model(once, **self.AGAIN, router_init_std=1.0)
        torch.testing.assert_close(twice.logits(tokens_BS()), stock_logits(base), rtol=0, atol=1e-5)

    def test_distinct_experts_are_kept_and_the_export_agrees(self, megatron, tmp_path, name):
        base = save_tiny(name, tmp_path / "base")
        once = rewrite(upcycle_hf(base, tmp_path / "once", Expansion(num_experts=4)), train_a_little)
        twice = megatron_model(once, **self.AGAIN, router_init_std=0.1)
        out = export(twice, tmp_path / "twice", num_experts=6, num_frozen=4)
        report = verify_export(out, once, num_frozen=4)
        assert report.ok, str(report)
        old, new = (load_file(folder / "model.safetensors") for folder in (once, out))
        zeros = {name for name in old if name.endswith("e_score_correction_bias")}  # one for each expert, in one row
        assert all(torch.equal(new[name][: len(old[name])], old[name]) for name in old.keys() - zeros)
        torch.testing.assert_close(twice.logits(tokens_BS()), stock_logits(out), rtol=0, atol=1e-4)

    def test_top_1_computes_the_same(self, tmp_path, name):
        """Expert 0 or a copy of it, whichever is chosen."""
        base = save_tiny(name, tmp_path / "base")
        once = rewrite(upcycle_hf(base, tmp_path / "once", Expansion(num_experts=4, topk=1)), train_a_little)
        twice = upcycle_hf(once, tmp_path / "twice", Expansion(num_experts=6, num_frozen=4, topk=1, router_std=0.0))
        torch.testing.assert_close(stock_logits(twice), stock_logits(once), rtol=0, atol=1e-5)

    def test_only_tokens_that_prefer_the_original_ffn_change(self, tmp_path, name):
        """One layer, top-2, no noise: a token with expert 0 first gets what the dense model gives, the others keep."""
        base = save_tiny(name, tmp_path / "base", num_hidden_layers=1)
        once = rewrite(upcycle_hf(base, tmp_path / "once", Expansion(num_experts=4)), train_a_little)
        twice = upcycle_hf(once, tmp_path / "twice", Expansion(num_experts=6, num_frozen=4, router_std=0.0))
        first_BS = most_probable_expert(once)
        before, after, dense = (stock_logits(folder) for folder in (once, twice, base))
        prefers = first_BS == 0
        assert prefers.sum() > 3 and (~prefers).sum() > 3
        torch.testing.assert_close(after[~prefers], before[~prefers], rtol=0, atol=1e-5)
        torch.testing.assert_close(after[prefers], dense[prefers], rtol=0, atol=1e-5)
        assert (before[prefers] - dense[prefers]).abs().max() > 0.1


def most_probable_expert(folder) -> torch.Tensor:
    """[B, S]: the expert with the largest logit in layer 0, from the inputs of the stock model's FFN."""
    model, seen = load_strictly(folder), []
    block = model.model.layers[0]
    ffn = getattr(block, "mlp", None) or block.block_sparse_moe
    ffn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(tokens_BS())
        return (seen[0] @ ffn.gate.weight.T).argmax(-1)
