"""Every kind of damage to an export is found, and nothing is found where there is none."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lpr.conversion.export import export_model, upcycle_hf
from megatron_lpr.conversion.families import read_architecture
from megatron_lpr.conversion.hf_io import SafetensorsReader
from megatron_lpr.conversion.upcycle import load_dense
from megatron_lpr.conversion.verify import frozen_digest, verify_export
from megatron_lpr.errors import UserError

EXPERTS = "model.layers.1.block_sparse_moe.experts."
Q_PROJ, K_PROJ, V_PROJ = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")


@pytest.fixture(scope="module")
def export(llama, tmp_path_factory, empty_rank):
    """An export as training leaves it: frozen tensors as loaded, new experts and routers changed."""
    arch = read_architecture(llama)
    parameters = empty_rank(arch, layers=arch.num_layers, num_frozen=1, num_experts=3)
    load_dense(parameters.items(), SafetensorsReader(llama), arch, num_frozen=1, num_experts=3, router_std=0.1)
    for name, parameter in parameters.items():
        if ".experts." in name or "router" in name:
            parameter += torch.randn_like(parameter) * 0.01
    out = tmp_path_factory.mktemp("export") / "model"
    return export_model(parameters.items(), arch, base_dir=llama, out_dir=out, num_experts=3, num_frozen=1)


def failed(report):
    return {check.name for check in report.checks if not check.ok}


def test_a_sound_export_passes_every_check(export, llama):
    report = verify_export(export, llama, num_frozen=1)
    assert report.ok and failed(report) == set(), str(report)
    details = {check.name: check.detail for check in report.checks}
    # 3 of the model, 6 of each layer, 3 of each frozen expert; 2 new experts of 3 tensors in 2 layers.
    assert details["frozen tensors"].startswith("21 of 21 equal")
    assert details["new experts"].startswith("12 of 12 tensors differ")
    assert details["stock class"].startswith("35 names")
    tensors = load_file(export / "model.safetensors")
    frozen = {
        name: tensor
        for name, tensor in tensors.items()
        if "gate" not in name and ".experts.1." not in name and ".experts.2." not in name
    }
    assert report.frozen_sha256 == frozen_digest(frozen.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_wider_and_narrower_exports_pass(llama_bf16, tmp_path, dtype):
    upcycle_hf(llama_bf16, tmp_path / "out", num_experts=3, dtype=dtype)
    report = verify_export(tmp_path / "out", llama_bf16, num_frozen=1)
    assert report.ok, str(report)
    assert "0 of 12 tensors differ" in str(report)


def test_every_family_and_a_second_frozen_expert(base, tmp_path):
    upcycle_hf(base, tmp_path / "out", num_experts=4, num_frozen=2)
    assert verify_export(tmp_path / "out", base, num_frozen=2).ok


def test_dense_export_gets_the_census_and_a_count(llama, tmp_path):
    out = shutil.copytree(llama, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    rope = {"rope_theta": 5e5, "rope_scaling": None}
    (out / "config.json").write_text(json.dumps({**config, **rope, "torch_dtype": "float32"}))
    report = verify_export(out, llama, num_frozen=1)
    assert report.ok and "0 of 21 tensors differ" in str(report), str(report)
    rewrite(out, lambda tensors: tensors.pop(Q_PROJ))
    assert failed(verify_export(out, llama, num_frozen=1)) == {"tensors", "stock class"}


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def swap(one, other):
    def change(tensors):
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def swap_experts(one, other):
    def change(tensors):
        for weight in ("w1", "w2", "w3"):
            swap(f"{EXPERTS}{one}.{weight}.weight", f"{EXPERTS}{other}.{weight}.weight")(tensors)

    return change


def one_ulp(tensors):
    weight = tensors[Q_PROJ]
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(torch.inf))


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name])})


@pytest.mark.parametrize(
    "change,checks",
    [
        (one_ulp, {"frozen tensors"}),
        (swap_experts(0, 2), {"frozen tensors"}),
        (swap(f"{EXPERTS}0.w1.weight", f"{EXPERTS}0.w3.weight"), {"frozen tensors"}),
        (swap(K_PROJ, V_PROJ), {"frozen tensors"}),
        (put("model.norm.weight", lambda norm: norm + 1e-3), {"frozen tensors"}),
        (put(f"{EXPERTS}0.w2.weight", torch.zeros_like), {"frozen tensors", "values"}),
        (put(f"{EXPERTS}2.w2.weight", torch.zeros_like), {"values"}),
        (put(f"{EXPERTS}1.w1.weight", lambda weight: weight / 0), {"values"}),
        (put("model.layers.0.block_sparse_moe.gate.weight", lambda weight: weight * torch.nan), {"values"}),
        (lambda tensors: tensors.pop(f"{EXPERTS}1.w1.weight"), {"tensors", "stock class"}),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), {"tensors", "stock class"}),
        (put("model.norm.weight", lambda norm: norm[:-1].clone()), {"tensors", "stock class"}),
        (put(Q_PROJ, lambda weight: weight.double().half()), {"tensors", "frozen tensors"}),
    ],
    ids=[
        "one_ulp", "frozen_swapped", "gate_up_swapped", "k_v_swapped", "norm_off", "frozen_zeroed",
        "new_zeroed", "infinite", "router_nan", "missing", "unexpected", "misshapen", "another_dtype",
    ],
)  # fmt: skip
def test_damage_is_found(export, llama, tmp_path, change, checks):
    broken = shutil.copytree(export, tmp_path / "broken")
    rewrite(broken, change)
    report = verify_export(broken, llama, num_frozen=1)
    assert not report.ok
    assert failed(report) == checks, str(report)


def test_the_tensor_that_differs_is_named(export, llama, tmp_path):
    broken = shutil.copytree(export, tmp_path / "broken")
    rewrite(broken, one_ulp)
    assert f"20 of 21 equal the base model's SHA-256; changed: {Q_PROJ}" in str(
        verify_export(broken, llama, num_frozen=1)
    )


@pytest.mark.parametrize(
    "field,value",
    [("rope_theta", 1e6), ("num_experts_per_tok", 9), ("rms_norm_eps", 1e-3), ("rope_parameters", None)],
)
def test_a_config_that_computes_something_else_is_found(export, llama, tmp_path, field, value):
    broken = shutil.copytree(export, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, field: value}))
    report = verify_export(broken, llama, num_frozen=1)
    assert "config" in failed(report) and field in str(report)


def test_another_tokenizer_is_found(export, llama, tmp_path):
    broken = shutil.copytree(export, tmp_path / "broken")
    (broken / "tokenizer.json").write_bytes(b"{}")
    assert failed(verify_export(broken, llama, num_frozen=1)) == {"files"}


def test_a_folder_that_is_no_export_of_the_base(llama, tmp_path):
    upcycle_hf(llama, tmp_path / "out", num_experts=3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(UserError, match="is a GPT2LMHeadModel with 3 experts"):
        verify_export(tmp_path / "out", llama)
    with pytest.raises(UserError, match="does not exist"):
        verify_export(tmp_path / "nowhere", llama)


def test_frozen_digest_sees_every_bit_and_name_but_not_the_order():
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0]])}
    digest = frozen_digest(tensors.items())
    assert digest == frozen_digest(reversed(tensors.items())) and len(digest) == 64
    others = [
        {**tensors, "b": torch.tensor([[-0.0]])},
        {"a": tensors["a"], "c": tensors["b"]},
        {**tensors, "a": torch.tensor([2.0, 1.0])},
        {"a": tensors["a"]},
    ]
    assert len({digest, *(frozen_digest(other.items()) for other in others)}) == 5
