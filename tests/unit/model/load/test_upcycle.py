"""Every rank of every layout holds its slice of the dense model, and the slices make up the whole."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import load_apart

from megatron_lpr.conversion.export.sources import to_hf
from megatron_lpr.errors import UserError
from megatron_lpr.families import family_of, read_architecture
from megatron_lpr.families.expansion import Expansion, router_rows
from megatron_lpr.families.weights import open_weights
from megatron_lpr.files.safetensors_io import SafetensorsReader
from megatron_lpr.model.load.upcycle import check_checkpoint, load_dense
from megatron_lpr.platform.place import RankPlace

MOE = {"num_frozen": 1, "num_experts": 5}
DENSE = {"num_frozen": 0, "num_experts": 0}
EXPERT_NUMBER = re.compile(r"(?<=local_experts\.)\d+|(?<=\.weight)\d+$")


def gather(slices, name):
    """The whole parameter from the slices of all its ranks, in rank order."""
    of_all_heads = re.search("[qk]_layernorm", name) and not torch.equal(slices[0], slices[-1])  # weights are random
    if len(slices) == 1 or (("layernorm" in name or "layer_norm" in name) and not of_all_heads):
        return slices[0]
    if "linear_fc1" in name:
        halves = [part.chunk(2) for part in slices]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(slices, dim=1 if "linear_proj" in name or "linear_fc2" in name else 0)


@pytest.fixture(scope="session")
def load_layout(empty_rank):
    def load(base, *, tp=1, ep=1, etp=1, experts=MOE, te_names=False, dtype=torch.float32):
        """Global Megatron names and whole tensors, gathered from the ranks of a layout."""
        arch = read_architecture(base)
        reader = open_weights(base, arch)
        layout = {"tp": tp, "ep": ep, "etp": etp, "layers": arch.num_layers, "te_names": te_names, **experts}
        ranks = {}
        for tp_rank in range(tp):
            for ep_rank in range(ep):
                for etp_rank in range(etp):
                    parameters = empty_rank(arch, dtype, **layout)
                    load_dense(
                        parameters.items(),
                        reader,
                        arch,
                        Expansion(router_std=0.5, router_seed=3, **experts),
                        place=RankPlace(
                            tp_rank=tp_rank, tp_size=tp, ep_rank=ep_rank, ep_size=ep, etp_rank=etp_rank, etp_size=etp
                        ),
                    )
                    ranks[tp_rank, ep_rank, etp_rank] = parameters
        whole = {}
        for name in ranks[0, 0, 0]:
            if ".experts." in name:
                continue
            replicated = "router" in name or "frozen" in name
            slices = [ranks[tp_rank, 0, 0][name] for tp_rank in range(1 if replicated else tp)]
            whole[name] = gather(slices, name)
            assert all(torch.equal(other[name], ranks[key[0], 0, 0][name]) for key, other in ranks.items())
        for ep_rank in range(ep):
            first = ep_rank * (MOE["num_experts"] - MOE["num_frozen"]) // ep
            for name in ranks[0, 0, 0]:
                if ".experts." in name:
                    renumbered = EXPERT_NUMBER.sub(lambda number, first=first: str(int(number[0]) + first), name)
                    slices = [ranks[0, ep_rank, etp_rank][name] for etp_rank in range(etp)]
                    whole[renumbered] = gather(slices, name)
        return arch, whole

    return load


def split_by_hand(base):
    """The base's tensors with the FFN's apart: (everything else, {(layer, which): weight})."""
    tensors = load_apart(base)
    ffn = {name: tensors.pop(name) for name in list(tensors) if ".mlp." in name}
    return tensors, {(int(name.split(".")[2]), name.split(".")[4]): weight for name, weight in ffn.items()}


@pytest.mark.parametrize("tp,ep,etp", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2), (2, 4, 2), (4, 1, 1)])
def test_any_layout_gathers_back_to_the_dense_bytes(base, tp, ep, etp, load_layout):
    arch, whole = load_layout(base, tp=tp, ep=ep, etp=etp)
    exported = dict(to_hf(whole.items(), arch, num_frozen=1))
    others, ffn = split_by_hand(base)
    for name, weight in others.items():
        assert torch.equal(exported.pop(name), weight), name
    for layer in range(arch.num_layers):
        mixtral = family_of(arch).moe.architecture == "MixtralForCausalLM"
        prefix = f"model.layers.{layer}." + ("block_sparse_moe." if mixtral else "mlp.")
        exported.pop(prefix + "gate.weight")
        for expert in range(MOE["num_experts"]):
            for number, theirs in ((1, "gate_proj"), (3, "up_proj"), (2, "down_proj")):
                ours = f"w{number}" if mixtral else theirs
                assert torch.equal(exported.pop(f"{prefix}experts.{expert}.{ours}.weight"), ffn[layer, theirs])
    assert not exported


@pytest.mark.parametrize("tp", [1, 2])
def test_dense_model(base, tp, load_layout):
    arch, whole = load_layout(base, tp=tp, experts=DENSE)
    expected = load_apart(base)
    exported = dict(to_hf(whole.items(), arch, num_frozen=0))
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


@pytest.mark.parametrize("experts", [MOE, DENSE], ids=["moe", "dense"])
def test_transformer_engine_names_mean_the_same(llama, experts, load_layout):
    arch, local = load_layout(llama, experts=experts)
    _, te = load_layout(llama, experts=experts, te_names=True)
    assert local.keys() != te.keys()
    local, te = (dict(to_hf(whole.items(), arch, num_frozen=experts["num_frozen"])) for whole in (local, te))
    assert local.keys() == te.keys() and all(torch.equal(local[name], te[name]) for name in local)


def test_vocabulary_padding_is_zero(llama, load_layout):
    arch, whole = load_layout(llama, tp=2)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert whole[name].shape[0] == 128 and not whole[name][arch.vocab_size :].any()


def test_bf16_base_is_cast_up_exactly(llama_bf16, load_layout):
    _, whole = load_layout(llama_bf16)
    expected = load_file(llama_bf16 / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert whole["decoder.layers.1.mlp.frozen_experts.0.linear_fc2.weight"].dtype == torch.float32
    assert torch.equal(whole["decoder.layers.1.mlp.frozen_experts.0.linear_fc2.weight"], expected.float())


def test_router_depends_on_seed_and_global_layer_only(llama, load_layout, empty_rank):
    arch, whole = load_layout(llama, tp=2, ep=2)
    routers = [whole[f"decoder.layers.{layer}.mlp.router.weight"] for layer in range(2)]
    assert not torch.equal(*routers)
    _, other = load_layout(llama)
    assert torch.equal(routers[1], other["decoder.layers.1.mlp.router.weight"])
    reader = SafetensorsReader(llama)
    stage = empty_rank(arch, layers=1, **MOE)
    load_dense(stage.items(), reader, arch, Expansion(router_std=0.5, router_seed=3, **MOE), layer_offset=1)
    assert torch.equal(stage["decoder.layers.0.mlp.router.weight"], routers[1])
    assert not torch.equal(
        router_rows(arch, Expansion(num_experts=5, router_std=0.5, router_seed=4), layer=1), routers[1]
    )


def test_router_has_the_standard_deviation_asked_for(llama):
    arch = read_architecture(llama)
    expansion = Expansion(num_experts=64, router_std=0.1)
    rows = torch.cat([router_rows(arch, expansion, layer=layer).flatten() for layer in range(8)])
    assert rows.dtype == torch.float32
    assert abs(rows.std() - 0.1) < 2e-3 and abs(rows.mean()) < 3e-3


def test_layer_offset_reads_the_global_layer(llama, empty_rank):
    arch = read_architecture(llama)
    stage = empty_rank(arch, layers=1, **MOE)
    filled = load_dense(stage.items(), SafetensorsReader(llama), arch, Expansion(**MOE), layer_offset=1)
    expected = load_file(llama / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(stage["decoder.layers.0.self_attention.linear_proj.weight"], expected)
    assert {name.layer for name in filled} == {None, 1} and len(filled) == len(stage)


def test_experts_are_read_once_and_columns_alone(llama, empty_rank):
    arch, read = read_architecture(llama), []
    sizes = {name: tensor.nbytes for name, tensor in load_file(llama / "model.safetensors").items()}
    for size in (1, 2):
        for rank in range(size):
            reader, parameters = SafetensorsReader(llama), empty_rank(arch, tp=size, layers=arch.num_layers, **MOE)
            place = RankPlace(tp_rank=rank, tp_size=size)
            load_dense(parameters.items(), reader, arch, Expansion(**MOE), place=place)
            read.append(reader.bytes_read)
    on_both = sum(size for name, size in sizes.items() if "norm" in name or ".mlp." in name)
    assert read[0] == sum(sizes.values())
    assert read[1] + read[2] == sum(sizes.values()) + on_both


def test_ranks_share_the_look_at_a_tied_head(tied, tmp_path, monkeypatch):
    from megatron_lpr.files import file_tensor

    monkeypatch.setattr(file_tensor, "_BLOCK_BYTES", 4096)
    tensors = load_file(tied / "model.safetensors")
    shutil.copytree(tied, tmp_path / "model")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    refused, read = 0, []
    for rank in range(3):
        reader = SafetensorsReader(tmp_path / "model")
        try:
            check_checkpoint(reader, read_architecture(tmp_path / "model"), (rank, 3))
        except UserError:
            refused += 1
        read.append(reader.bytes_read)
    assert refused == 1 and sum(read) == 2 * tensors["lm_head.weight"].nbytes


def test_tied_head_of_a_last_stage_is_the_embedding(tied):
    arch = read_architecture(tied)
    head = {"output_layer.weight": torch.full((64, arch.hidden_size), torch.nan)}
    load_dense(head.items(), SafetensorsReader(tied), arch, Expansion(**MOE))
    expected = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(head["output_layer.weight"][: arch.vocab_size], expected)


def test_a_parameter_that_is_unknown_missing_or_given_twice_is_refused(llama, empty_rank):
    arch, reader = read_architecture(llama), SafetensorsReader(llama)

    def load(parameters):
        load_dense(parameters, reader, arch, Expansion(**MOE))

    whole = empty_rank(arch, layers=2, **MOE)
    load(whole.items())
    with pytest.raises(AssertionError, match="linear_qkv.bias"):
        load([*whole.items(), ("decoder.layers.0.self_attention.linear_qkv.bias", torch.zeros(64))])
    with pytest.raises(AssertionError, match="twice"):
        load([*whole.items(), ("decoder.layers.0.input_layernorm.weight", torch.zeros(32))])
    for name in ("pre_mlp_layernorm.weight", "mlp.experts.local_experts.3.linear_fc2.weight"):
        rest = [item for item in whole.items() if item[0] != f"decoder.layers.1.{name}"]
        with pytest.raises(AssertionError, match="missing"):
            load(rest)


def test_experts_must_be_divisible_over_ranks_and_make_sense(llama):
    arch, reader = read_architecture(llama), SafetensorsReader(llama)
    with pytest.raises(UserError, match="4 new experts cannot be divided over 3"):
        load_dense([], reader, arch, Expansion(**MOE), place=RankPlace(ep_size=3))
    with pytest.raises(UserError, match="at least one must be frozen and one new"):
        load_dense([], reader, arch, Expansion(num_frozen=2, num_experts=2))


def edit(base, tmp_path, change):
    shutil.copytree(base, tmp_path / "model")
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "no tensor .*1.mlp.up_proj"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "'extra', which has no place"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}), "shape \\(31,\\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "I8; supported"),
    ],
    ids=["missing", "extra", "misshapen", "integer"],
)
def test_a_checkpoint_that_is_not_its_config_is_refused(llama, tmp_path, change, message):
    folder = edit(llama, tmp_path, change)
    with pytest.raises(UserError, match=message):
        load_dense([], SafetensorsReader(folder), read_architecture(folder), Expansion(**MOE))


def test_leftovers_of_old_checkpoints_are_ignored(llama, tmp_path):
    def tie(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = edit(llama, tmp_path, tie)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    load_dense([], SafetensorsReader(folder), read_architecture(folder), Expansion(**MOE))
