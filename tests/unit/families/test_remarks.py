"""What a user is told of a conversion that works all the same; and that transformers agrees about the rows."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import rewrite

from megatron_lpr.conversion.export.export import upcycle_hf
from megatron_lpr.families import read_architecture
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.families.remarks import base_remarks, remarks
from megatron_lpr.recipe.settings import ExportConfig
from megatron_lpr.testing.toy_models import write_toy_model


def told(base, dtype, num_experts=3):
    return list(remarks(read_architecture(base), base, dtype=dtype, num_experts=num_experts))


@pytest.mark.parametrize("dtype, width, runs", [("float32", 44, True), ("float32", 42, False), ("bfloat16", 44, False)])
def test_rows_that_transformers_default_kernel_refuses(tmp_path, capsys, dtype, width, runs):
    base = write_toy_model(tmp_path / "base", dtype=dtype, intermediate_size=width)
    out = upcycle_hf(base, tmp_path / "out", Expansion(num_experts=3))
    warned = capsys.readouterr().err
    assert ("" if runs else f"warning: the expert width {width} makes rows of ") in warned
    assert runs == (warned == "")
    tokens = torch.arange(12)[None]
    if int(transformers.__version__.split(".")[0]) >= 5:  # 4.x knows no kernels of experts
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        if not runs:
            with pytest.raises(RuntimeError, match="multiple of 16"):
                model(tokens)
            assert "experts_implementation='eager'" in warned
            model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype, experts_implementation="eager")
        assert model(tokens).logits.isfinite().all()
    assert told(base, dtype, num_experts=0) == []


def test_a_base_without_tokenizer(tmp_path, capsys):
    base = write_toy_model(tmp_path / "base")
    assert told(base, "float32") == []
    (base / "tokenizer.json").unlink()
    (sentence,) = base_remarks(read_architecture(base), base, dtype="float32")
    assert f"'{base}' holds no tokenizer (tokenizer.json" in sentence
    upcycle_hf(base, tmp_path / "out", Expansion(num_experts=3), dry_run=True)
    assert capsys.readouterr().err == f"warning: {sentence}\n"


@pytest.mark.parametrize(
    "base, dtype, exact",
    [
        ("float16", "float16", True),
        ("float16", "float32", True),
        ("float16", "bfloat16", False),
        ("bfloat16", "float32", True),
        ("bfloat16", "float16", False),
        ("float32", "bfloat16", False),
    ],
)
def test_a_dtype_that_rounds_is_told_and_one_that_does_not_is_exact(tmp_path, capsys, base, dtype, exact):
    name = "model.embed_tokens.weight"
    folder = rewrite(write_toy_model(tmp_path / "base", dtype=base), lambda tensors: tensors[name][0].fill_(1e-9))
    out = upcycle_hf(
        folder,
        tmp_path / "out",
        Expansion(num_experts=3),
        settings=ExportConfig(dtype=dtype),
        on_verified=lambda report: None,
    )
    assert (capsys.readouterr().err == "") == exact
    before, after = (load_file(path / "model.safetensors")[name] for path in (folder, out))
    assert torch.equal(before.double(), after.double()) == exact


@pytest.mark.parametrize(
    "name, head_dim, warned",
    [("qwen2", 16, True), ("qwen2", 8, False), ("qwen3", 16, False), ("seed_oss", 64, True)],
)
def test_heads_that_transformers_4_and_vllm_do_not_read(tmp_path, name, head_dim, warned):
    """Only a Qwen2-MoE's, and only where they are not what the two take them for."""
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "seed_oss": "SeedOssForCausalLM"}[name]
    fields = {"attention_bias": True} if name == "seed_oss" else {}
    base = write_toy_model(
        tmp_path / "base", architectures=[architecture], model_type=name, head_dim=head_dim, **fields
    )
    sentences = told(base, "float32")
    assert any(f"heads of {head_dim} do not make up the hidden size" in sentence for sentence in sentences) == warned
    assert told(base, "float32", num_experts=0) == []
