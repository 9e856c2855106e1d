"""Exports against transformers' own loading, and against a plain computation with experts that differ."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import load_apart
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_lpr.conversion.export.export import export_model, upcycle_hf
from megatron_lpr.conversion.verify.verify import verify_export
from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.families.weights import open_weights
from megatron_lpr.model.load.upcycle import load_dense
from megatron_lpr.recipe.settings import ExportConfig

TOKENS = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(0))


def load_strictly(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(folder):
    with torch.no_grad():
        return load_strictly(folder)(TOKENS).logits


@pytest.mark.parametrize("router_std,num_frozen", [(0.0, 1), (1.0, 1), (1.0, 2)])
def test_upcycled_model_computes_what_the_dense_model_does(base, tmp_path, router_std, num_frozen):
    upcycle_hf(base, tmp_path / "out", Expansion(num_experts=4, num_frozen=num_frozen, router_std=router_std))
    expected = logits(base)
    assert expected.std() > 0.1
    assert (logits(tmp_path / "out") - expected).abs().max() < 1e-5


def test_offline_upcycling_equals_loading_and_exporting(base, tmp_path, empty_rank):
    arch = read_architecture(base)
    parameters = empty_rank(arch, layers=arch.num_layers, num_frozen=1, num_experts=3)
    load_dense(
        parameters.items(),
        open_weights(base, arch),
        arch,
        Expansion(num_frozen=1, num_experts=3, router_std=0.1, router_seed=7),
    )
    export_model(
        parameters.items(), arch, Expansion(num_experts=3, num_frozen=1), base_dir=base, out_dir=tmp_path / "a"
    )
    upcycle_hf(base, tmp_path / "b", Expansion(num_experts=3, router_std=0.1, router_seed=7))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def ffn_by_hand(parameters, prefix, x_TH):
    gate, up = (x_TH @ half.T for half in parameters[prefix + "linear_fc1.weight"].chunk(2))
    return (F.silu(gate) * up) @ parameters[prefix + "linear_fc2.weight"].T


def test_distinct_experts_land_where_the_router_expects_them(llama, tmp_path, trained):
    arch = read_architecture(llama)
    parameters = trained(arch, 2, 5)
    model = load_strictly(
        export_model(
            reversed(parameters.items()),
            arch,
            Expansion(num_experts=5, num_frozen=2),
            settings=ExportConfig(dtype="float32"),
            base_dir=llama,
            out_dir=tmp_path / "out",
        )  # fmt: skip
    )
    x_TH = torch.randn(20, arch.hidden_size, generator=torch.Generator().manual_seed(1))
    names = [f"frozen_experts.{n}." for n in range(2)] + [f"experts.local_experts.{n}." for n in range(3)]
    for layer in range(arch.num_layers):
        prefix = f"decoder.layers.{layer}.mlp."
        p_TE = (x_TH @ parameters[prefix + "router.weight"].T).softmax(-1)
        top_TK = p_TE.topk(2).indices
        mask_TE = torch.zeros_like(p_TE).scatter(1, top_TK, 1.0)
        gates_TE = p_TE * mask_TE / (p_TE * mask_TE).sum(1, keepdim=True)
        expected_TH = sum(
            gates_TE[:, n, None] * ffn_by_hand(parameters, prefix + name, x_TH) for n, name in enumerate(names)
        )
        assert mask_TE.sum(0).min() > 0
        with torch.no_grad():
            block = model.model.layers[layer]
            got_TH = getattr(block, "mlp", None) or block.block_sparse_moe
            got_TH = got_TH(x_TH[None])
            got_TH = got_TH[0] if isinstance(got_TH, tuple) else got_TH
        torch.testing.assert_close(got_TH.reshape_as(expected_TH), expected_TH, atol=1e-4, rtol=1e-4)


def test_dense_export_is_a_dense_class_again(base, tmp_path, empty_rank):
    arch = read_architecture(base)
    parameters = empty_rank(arch, layers=arch.num_layers, num_frozen=0, num_experts=0)
    load_dense(parameters.items(), open_weights(base, arch), arch)
    out = export_model(parameters.items(), arch, Expansion(), base_dir=base, out_dir=tmp_path / "out")
    expected, got = load_apart(base), load_file(out / "model.safetensors")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    torch.testing.assert_close(logits(out), logits(base), rtol=0, atol=1e-5)
    assert verify_export(out, base).ok


def test_config_says_the_same_to_both_major_versions(tied, tmp_path):
    upcycle_hf(tied, tmp_path / "out", Expansion(num_experts=3, topk=1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert config["rope_theta"] == 1e5 and config["rope_scaling"] == scaling
    assert config["rope_parameters"] == {"rope_theta": 1e5, **scaling}
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["num_local_experts"] == 3 and config["num_experts_per_tok"] == 1
    assert config["head_dim"] == 16 and config["sliding_window"] is None
    assert config["output_router_logits"] is False and config["router_jitter_noise"] == 0.0
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert type(read).__name__ == "MixtralConfig" and read.tie_word_embeddings is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_bf16_base_exported_as_fp32_and_back_is_exact(llama_bf16, tmp_path):
    upcycle_hf(llama_bf16, tmp_path / "same", Expansion(num_experts=2))
    upcycle_hf(llama_bf16, tmp_path / "wide", Expansion(num_experts=2), settings=ExportConfig(dtype="float32"))
    name = "model.layers.0.self_attn.q_proj.weight"
    base = load_file(llama_bf16 / "model.safetensors")[name]
    same = load_file(tmp_path / "same" / "model.safetensors")[name]
    wide = load_file(tmp_path / "wide" / "model.safetensors")[name]
    assert same.dtype == torch.bfloat16 and torch.equal(same, base)
    assert wide.dtype == torch.float32 and torch.equal(wide, base.float())


def test_tokenizer_and_generation_config_are_copied(llama, tmp_path, trained):
    arch = read_architecture(llama)
    out = export_model(
        trained(arch, 1, 3).items(),
        arch,
        Expansion(num_experts=3, num_frozen=1),
        base_dir=llama,
        out_dir=tmp_path / "out",
    )
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (llama / "generation_config.json").read_bytes()


def test_shards_by_byte_budget(llama, tmp_path):
    upcycle_hf(llama, tmp_path / "out", Expansion(num_experts=3), settings=ExportConfig(max_shard_size="20KB"))
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "out"))
    assert (logits(tmp_path / "out") - logits(llama)).abs().max() < 1e-5


def damage_stream(parameters, how):
    items = list(parameters.items())
    if how == "missing":
        return items[:-1], UserError
    if how == "fails":

        def stream():
            yield from items[:3]
            raise KeyboardInterrupt

        return stream(), KeyboardInterrupt
    return [*items, items[0]], AssertionError


@pytest.mark.parametrize("how", ["missing", "fails", "twice"])
def test_no_folder_is_left_behind(llama, tmp_path, trained, how):
    arch = read_architecture(llama)
    stream, error = damage_stream(trained(arch, 1, 3), how)
    with pytest.raises(error):
        export_model(stream, arch, Expansion(num_experts=3, num_frozen=1), base_dir=llama, out_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_expert_too_many_is_refused(llama, tmp_path, trained):
    arch = read_architecture(llama)
    with pytest.raises(AssertionError):
        export_model(
            trained(arch, 1, 4).items(),
            arch,
            Expansion(num_experts=3, num_frozen=1),
            base_dir=llama,
            out_dir=tmp_path / "out",
        )
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_output_folder_is_refused_and_left_alone(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        upcycle_hf(llama, tmp_path, Expansion(num_experts=3))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"num_experts": 1}, "at least one must be frozen and one new"),
        ({"num_experts": 3, "topk": 4}, "top-4 routing over 3 experts"),
        ({"num_experts": 3, "settings": ExportConfig(dtype="int8")}, "'int8' is not supported"),
        ({"num_experts": 3, "settings": ExportConfig(max_shard_size="0KB")}, "'0KB' is no size"),
    ],
)
def test_impossible_requests(llama, tmp_path, arguments, message):
    settings = arguments.pop("settings", None)
    with pytest.raises(UserError, match=message):
        upcycle_hf(llama, tmp_path / "out", Expansion(**arguments), settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_base_leaves_no_output(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(UserError, match="no tensor"):
        upcycle_hf(base, tmp_path / "out", Expansion(num_experts=3))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
