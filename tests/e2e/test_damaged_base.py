"""A base model that is not what it says is refused in one sentence, and nothing is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import rewrite, rewrite_config, save_tiny

from megatron_lpr import cli
from megatron_lpr.conversion.export.export import upcycle_hf
from megatron_lpr.errors import UserError
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.files.safetensors_io import SafetensorsReader, ShardedWriter
from megatron_lpr.recipe.settings import ExportConfig
from megatron_lpr.testing.toy_models import write_recipe

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def in_shards(folder):
    reader = SafetensorsReader(folder)
    shapes = {name: reader.shape(name) for name in reader.keys()}
    writer = ShardedWriter(folder, shapes, dtype=torch.float32, max_shard_bytes=20_000)
    for name in shapes:
        writer.write(name, reader.get(name))
    writer.close()
    (folder / "model.safetensors").unlink()
    return folder


def without_a_shard(folder):
    sorted(in_shards(folder).glob("*.safetensors"))[1].unlink()


def truncated(folder):
    file = sorted(in_shards(folder).glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-8])


def renamed(tensors):
    tensors[UP.replace("up", "upper")] = tensors.pop(UP)


def elsewhere(folder):
    index = json.loads((in_shards(folder) / "model.safetensors.index.json").read_text())
    file = index["weight_map"][UP]
    (folder / file).rename(folder.parent / "elsewhere.safetensors")
    weights = {name: "../elsewhere.safetensors" if at == file else at for name, at in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def two_models(folder):
    """An old single file beside the shards: transformers would read the one, we the other."""
    single = (folder / "model.safetensors").read_bytes()
    in_shards(folder)
    (folder / "model.safetensors").write_bytes(single)


def twice(folder):
    """One tensor in two shards, with other values in the one that the index does not name."""
    file = sorted(in_shards(folder).glob("*.safetensors"))[-1]
    name = "model.embed_tokens.weight"
    save_file(load_file(file) | {name: torch.zeros(60, 32)}, file, metadata={"format": "pt"})


def untied(folder):
    rewrite_config(folder, tie_word_embeddings=True)


DAMAGE = {
    "missing": (lambda folder: rewrite(folder, lambda t: t.pop(UP)), f"no tensor '{UP}'"),
    "extra": (lambda folder: rewrite(folder, lambda t: t.update(extra=torch.zeros(2))), "'extra', which has no place"),
    "renamed": (lambda folder: rewrite(folder, renamed), f"no tensor '{UP}'"),
    "misshapen": (lambda folder: rewrite(folder, lambda t: t.update({NORM: torch.zeros(31)})), "shape (31,)"),
    "dtype": (lambda folder: rewrite(folder, lambda t: t.update({NORM: t[NORM].half()})), "is torch.float16, but"),
    "truncated": (truncated, "damaged or truncated"),
    "no_shard": (without_a_shard, "lacks the shard"),
    "elsewhere": (elsewhere, "names '../elsewhere.safetensors': a shard is a .safetensors file inside the folder"),
    "two_models": (two_models, "holds two models, model.safetensors, which transformers reads, and"),
    "twice": (twice, "holds the tensor 'model.embed_tokens.weight' twice"),
    "untied": (untied, "holds a 'lm_head.weight' that is not its 'model.embed_tokens.weight'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_megatron_checkpoint_and_no_folder(tmp_path, capsys, damage):
    base = save_tiny("llama", tmp_path / "base")
    change, message = DAMAGE[damage]
    change(base)
    model = {"base": str(base), "num_experts": 3}
    recipe = write_recipe(tmp_path / "recipe.yaml", {"name": "x", "output": str(tmp_path / "out"), "model": model})
    capsys.readouterr()  # transformers' progress bars
    assert cli.main(["upcycle", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1
    with pytest.raises(UserError, match="") as refused:
        upcycle_hf(base, tmp_path / "hf", Expansion(num_experts=3))
    assert message in str(refused.value)
    left = {path.name for path in tmp_path.iterdir()} - {"elsewhere.safetensors"}
    assert left == {"base", "recipe.yaml"}


def put(value):
    def change(folder):
        rewrite(folder, lambda tensors: tensors[UP].__setitem__((3, 5), value))

    return change


@pytest.mark.parametrize("value, dtype", [("nan", "float32"), ("-inf", "float32"), ("3.4e38", "bfloat16")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, capsys, value, dtype):
    """As they are, or once they are cast."""
    base = save_tiny("llama", tmp_path / "base")
    put(float(value))(base)
    model = {"base": str(base), "num_experts": 3, "dtype": dtype}
    recipe = write_recipe(tmp_path / "recipe.yaml", {"name": "x", "output": str(tmp_path / "out"), "model": model})
    capsys.readouterr()
    assert cli.main(["upcycle", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert f"tensor '{UP}' of '{base}' holds values that are not finite as torch.{dtype}" in error
    assert error.count("error: ") == 1 and "Traceback" not in error and not (tmp_path / "out/checkpoints").exists()
    with pytest.raises(UserError, match=r"fails its own verification: values: .* is not finite"):
        upcycle_hf(
            base,
            tmp_path / "hf",
            Expansion(num_experts=3),
            settings=ExportConfig(dtype=dtype),
            on_verified=lambda report: None,
        )
    assert not (tmp_path / "hf").exists()


def test_a_router_that_is_not_finite(tmp_path):
    base = upcycle_hf(save_tiny("llama", tmp_path / "base"), tmp_path / "moe", Expansion(num_experts=3))
    name = "model.layers.1.block_sparse_moe.gate.weight"
    rewrite(base, lambda tensors: tensors[name].__setitem__((0, 0), float("nan")))
    model = {"base": str(base), "num_experts": 5, "num_frozen_experts": 3}
    recipe = write_recipe(tmp_path / "recipe.yaml", {"name": "x", "output": str(tmp_path / "out"), "model": model})
    assert cli.main(["upcycle", str(recipe)]) == 2


def test_a_tied_head_that_is_the_embedding_again(tmp_path):
    """Old versions of transformers save it."""
    base = save_tiny("llama_tied_llama3_head_dim", tmp_path / "base")
    rewrite(base, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    upcycle_hf(base, tmp_path / "out", Expansion(num_experts=3), on_verified=lambda report: None)
    rewrite(base, lambda tensors: tensors["lm_head.weight"][5, 7].neg_())
    with pytest.raises(UserError, match=r"holds a 'lm_head.weight' that is not its"):
        upcycle_hf(base, tmp_path / "other", Expansion(num_experts=3))


def test_a_trained_shared_expert_is_refused(tmp_path):
    base = save_tiny("qwen2", tmp_path / "base")
    moe = upcycle_hf(base, tmp_path / "moe", Expansion(num_experts=3))
    rewrite(moe, lambda t: t["model.layers.0.mlp.shared_expert.down_proj.weight"].fill_(1.0))
    with pytest.raises(UserError, match="shared_expert.down_proj.weight' .* is not zero"):
        upcycle_hf(moe, tmp_path / "out", Expansion(num_experts=5, num_frozen=3))


@pytest.mark.parametrize(
    "asked,message",
    [
        ({"num_experts": 5}, "all 4 experts of the base model are frozen .* to 4, not 1"),
        ({"num_experts": 3}, "has 4 experts already, so num_experts cannot be 3"),
        ({"num_experts": 5, "num_frozen": 4, "topk": 1}, "routes to its top 2 experts"),
        ({"num_experts": 5, "num_frozen": 4, "mlp_only_layers": [0]}, "a MixtralForCausalLM has experts in every"),
    ],
)
def test_what_a_model_with_experts_cannot_become(tmp_path, asked, message):
    once = upcycle_hf(save_tiny("llama", tmp_path / "base"), tmp_path / "once", Expansion(num_experts=4))
    with pytest.raises(UserError, match=message):
        upcycle_hf(once, tmp_path / "out", Expansion(**asked))


def test_a_mixtral_has_no_shared_expert(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    with pytest.raises(UserError, match="a MixtralForCausalLM has no shared expert"):
        upcycle_hf(base, tmp_path / "out", Expansion(num_experts=5), settings=ExportConfig(shared_expert_size=8))


def test_a_shared_expert_keeps_its_width(tmp_path):
    moe = upcycle_hf(
        save_tiny("qwen2", tmp_path / "base"),
        tmp_path / "moe",
        Expansion(num_experts=3),
        settings=ExportConfig(shared_expert_size=8),
    )
    with pytest.raises(UserError, match="has one of width 8 already"):
        upcycle_hf(
            moe, tmp_path / "out", Expansion(num_experts=5, num_frozen=3), settings=ExportConfig(shared_expert_size=128)
        )
    with pytest.raises(UserError, match="shared_expert_size -1: at least 0"):
        upcycle_hf(
            tmp_path / "base", tmp_path / "out", Expansion(num_experts=5), settings=ExportConfig(shared_expert_size=-1)
        )


@pytest.mark.parametrize("layers", [[-1], [2], [0, 1]])
def test_layers_that_are_not_there(tmp_path, layers):
    base = save_tiny("qwen3", tmp_path / "base")
    with pytest.raises(UserError, match="some, not all, of the layers 0 to 1"):
        upcycle_hf(base, tmp_path / "out", Expansion(num_experts=3, mlp_only_layers=layers))


def test_a_config_of_another_dtype_than_its_tensors(tmp_path):
    base = rewrite_config(save_tiny("llama", tmp_path / "base"), dtype="bfloat16")
    with pytest.raises(UserError, match="is torch.float32, but its config says torch.bfloat16"):
        upcycle_hf(base, tmp_path / "out", Expansion(num_experts=3))
    shutil.rmtree(base)
    assert not list(tmp_path.iterdir())
