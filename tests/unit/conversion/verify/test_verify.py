"""Every kind of damage to an export is found, and nothing is found where there is none."""

import hashlib
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import rewrite, rewrite_config, save_tiny, train_a_little

from megatron_lpr.conversion.export.export import export_model, upcycle_hf
from megatron_lpr.conversion.export.sources import to_hf
from megatron_lpr.conversion.record import RECORD_FILE
from megatron_lpr.conversion.verify.tensors import compare_tensors, digest_of_digests
from megatron_lpr.conversion.verify.verify import verify_export
from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.files.safetensors_io import SafetensorsReader
from megatron_lpr.model.load.upcycle import load_dense
from megatron_lpr.recipe.settings import ExportConfig

EXPERTS = "model.layers.1.block_sparse_moe.experts."
Q_PROJ, K_PROJ, V_PROJ = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")


@pytest.fixture(scope="module")
def export(llama, tmp_path_factory, empty_rank):
    """An export as training leaves it: frozen tensors as loaded, new experts and routers changed."""
    arch = read_architecture(llama)
    parameters = empty_rank(arch, layers=arch.num_layers, num_frozen=1, num_experts=3)
    load_dense(
        parameters.items(), SafetensorsReader(llama), arch, Expansion(num_frozen=1, num_experts=3, router_std=0.1)
    )
    for name, parameter in parameters.items():
        if ".experts." in name or "router" in name:
            parameter += torch.randn_like(parameter) * 0.01
    out = tmp_path_factory.mktemp("export") / "model"
    return export_model(parameters.items(), arch, Expansion(num_experts=3, num_frozen=1), base_dir=llama, out_dir=out)


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
    assert report.frozen_sha256 == digest_of(frozen)


def digest_of(tensors):
    """Written out by hand."""
    return digest_of_digests(
        (name, hashlib.sha256(str(tensor.dtype).encode() + tensor.view(torch.uint8).numpy().tobytes()).hexdigest())
        for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_wider_and_narrower_exports_pass(llama_bf16, tmp_path, dtype):
    upcycle_hf(llama_bf16, tmp_path / "out", Expansion(num_experts=3), settings=ExportConfig(dtype=dtype))
    report = verify_export(tmp_path / "out", llama_bf16, num_frozen=1)
    assert report.ok, str(report)
    assert "0 of 12 tensors differ" in str(report)


def test_every_family_and_a_second_frozen_expert(base, tmp_path):
    upcycle_hf(base, tmp_path / "out", Expansion(num_experts=4, num_frozen=2))
    assert verify_export(tmp_path / "out", base, num_frozen=2).ok


def test_dense_export_gets_the_census_and_a_count(llama, tmp_path):
    out = shutil.copytree(llama, tmp_path / "out")
    rewrite_config(out, rope_theta=5e5, rope_scaling=None, torch_dtype="float32")
    report = verify_export(out, llama, num_frozen=1)
    assert report.ok and "0 of 21 tensors differ" in str(report), str(report)
    rewrite(out, lambda tensors: tensors.pop(Q_PROJ))
    assert failed(verify_export(out, llama, num_frozen=1)) == {"tensors", "stock class"}
    recorded = upcycle_hf(llama, tmp_path / "recorded", Expansion())
    assert verify_export(recorded, llama, num_frozen=1).ok  # a number that says nothing of it


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
        (put("model.norm.weight", lambda norm: torch.cat([norm, norm[:1]])), {"tensors", "stock class"}),
        (put(Q_PROJ, lambda weight: weight.double().half()), {"tensors", "frozen tensors"}),
    ],
    ids=[
        "one_ulp", "frozen_swapped", "gate_up_swapped", "k_v_swapped", "norm_off", "frozen_zeroed",
        "new_zeroed", "infinite", "router_nan", "missing", "unexpected", "too_short", "too_long", "another_dtype",
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
    broken = rewrite_config(shutil.copytree(export, tmp_path / "broken"), **{field: value})
    report = verify_export(broken, llama, num_frozen=1)
    assert "config" in failed(report) and field in str(report)


def test_another_tokenizer_is_found(export, llama, tmp_path):
    broken = shutil.copytree(export, tmp_path / "broken")
    (broken / "tokenizer.json").write_bytes(b"{}")
    assert failed(verify_export(broken, llama, num_frozen=1)) == {"files"}


def test_a_folder_that_is_no_export_of_the_base(llama, tmp_path):
    upcycle_hf(llama, tmp_path / "out", Expansion(num_experts=3))
    rewrite_config(tmp_path / "out", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UserError, match="is a GPT2LMHeadModel with 3 experts"):
        verify_export(tmp_path / "out", llama)
    with pytest.raises(UserError, match="does not exist"):
        verify_export(tmp_path / "nowhere", llama)


def test_the_digest_sees_every_bit_and_name_but_not_the_order():
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0]])}
    digest = digest_of(tensors)
    assert digest == digest_of(dict(reversed(tensors.items()))) and len(digest) == 64
    others = [
        {**tensors, "b": torch.tensor([[-0.0]])},
        {"a": tensors["a"], "c": tensors["b"]},
        {**tensors, "a": torch.tensor([2.0, 1.0])},
        {"a": tensors["a"]},
    ]
    assert len({digest, *(digest_of(other) for other in others)}) == 5


EXPERT_2 = re.compile(r"experts\.2\.(down_proj|w2)")
QWEN_FFN = "model.layers.1.mlp."


@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied", "qwen3", "mistral_window"])
def test_a_sound_export_of_every_family_and_of_a_second_round(tmp_path, name):
    base = save_tiny(name, tmp_path / "base")
    once = rewrite(upcycle_hf(base, tmp_path / "once", Expansion(num_experts=3)), train_a_little)
    twice = upcycle_hf(once, tmp_path / "twice", Expansion(num_experts=5, num_frozen=3))
    for report in (verify_export(once, base), verify_export(twice, once, num_frozen=3), verify_export(twice, once)):
        assert report.ok, str(report)
    # trained in the first round, frozen in the second
    rewrite(twice, swap(*sorted(key for key in load_file(once / "model.safetensors") if EXPERT_2.search(key))))
    for asked in ({"num_frozen": 3}, {}):
        assert failed(verify_export(twice, once, **asked)) == {"frozen tensors"}
    for folder in (once, twice):
        (folder / RECORD_FILE).unlink()
    assert failed(verify_export(twice, once)) == {"frozen tensors"}  # the base's experts are frozen at least
    assert verify_export(once, once).ok
    with pytest.raises(UserError, match="5 experts with 5 frozen"):
        verify_export(twice, once, num_frozen=5)


@pytest.mark.parametrize(
    "changes,checks",
    [
        (lambda tensors: tensors[f"{QWEN_FFN}shared_expert.down_proj.weight"].fill_(0.1), {"values"}),
        (lambda tensors: tensors["model.layers.0.self_attn.k_proj.bias"].add_(1e-3), {"frozen tensors"}),
        (lambda tensors: tensors.pop(f"{QWEN_FFN}shared_expert_gate.weight"), {"tensors", "stock class"}),
    ],
    ids=["shared_expert", "bias", "shared_gate_missing"],
)
def test_damage_to_what_only_qwen_has(tmp_path, changes, checks):
    base = save_tiny("qwen2", tmp_path / "base")
    broken = rewrite(upcycle_hf(base, tmp_path / "moe", Expansion(num_experts=3)), changes)
    assert failed(verify_export(broken, base)) == checks


def permute_router(tensors):
    name = "model.layers.1.block_sparse_moe.gate.weight"
    tensors[name] = tensors[name].roll(1, 0)


def negative_zero(weight):
    assert weight[0, 0] == 0
    return torch.where(weight == 0, -weight, weight)


AGAINST_THE_CHECKPOINT = {
    "new_experts_swapped": (swap_experts(1, 2), 6),
    "one_expert_zeroed": (lambda t: [t[f"{EXPERTS}2.{w}.weight"].zero_() for w in ("w1", "w2", "w3")], 3),
    "router_rows_permuted": (permute_router, 1),
    "k_and_v_swapped": (swap(K_PROJ, V_PROJ), 2),
    "gate_and_up_swapped": (swap(f"{EXPERTS}1.w1.weight", f"{EXPERTS}1.w3.weight"), 2),
    "norm_off": (put("model.layers.0.input_layernorm.weight", lambda norm: norm + 1e-3), 1),
    "one_ulp": (one_ulp, 1),
    "sign_of_zero": (put(f"{EXPERTS}1.w1.weight", negative_zero), 1),
    "missing": (lambda tensors: tensors.pop(K_PROJ), 1),
    "unexpected": (lambda tensors: tensors.update(extra=torch.zeros(2)), 1),
}


class InMemory:
    """A source of tensors that are there already."""

    def __init__(self, tensors):
        self.tensors = dict(tensors)
        self.units = {name: [name] for name in self.tensors}

    def stream(self, units):
        return ((name, self.tensors[name]) for name in units)


@pytest.mark.parametrize("damage", AGAINST_THE_CHECKPOINT)
def test_an_export_that_is_not_its_checkpoint_is_found(llama, tmp_path, trained, damage):
    """New experts and routers too, of which the base model knows nothing."""
    arch, parameters = read_architecture(llama), trained(read_architecture(llama), 1, 3)
    parameters["decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"][0, 0] = 0.0
    out = export_model(
        parameters.items(), arch, Expansion(num_experts=3, num_frozen=1), base_dir=llama, out_dir=tmp_path / "out"
    )

    def compare():
        return compare_tensors(SafetensorsReader(out), InMemory(to_hf(parameters.items(), arch, num_frozen=1)))

    assert compare().ok, str(compare())
    change, number = AGAINST_THE_CHECKPOINT[damage]
    rewrite(out, change)
    assert not compare().ok and f"{number} tensors differ" in str(compare())


def test_blocks_make_no_difference(export, llama, tmp_path, monkeypatch):
    from megatron_lpr.files import file_tensor

    whole = verify_export(export, llama)
    broken = rewrite(shutil.copytree(export, tmp_path / "broken"), one_ulp)
    zeroed = rewrite(shutil.copytree(export, tmp_path / "zeroed"), put(f"{EXPERTS}2.w2.weight", torch.zeros_like))
    monkeypatch.setattr(file_tensor, "_BLOCK_BYTES", 300)  # two rows of most tensors
    assert verify_export(export, llama) == whole
    assert failed(verify_export(broken, llama)) == {"frozen tensors"}
    assert failed(verify_export(zeroed, llama)) == {"values"}
