"""Delta grafting against the sum that the method is, tensor by tensor, and against pairs of models that do not fit."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_run import toy_parameters, write_run

from megatron_lpr.conversion.export.export import export_checkpoint
from megatron_lpr.conversion.export.graft import add_delta
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import ExportConfig
from megatron_lpr.testing.toy_models import write_toy_model

DENSE = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("base") / "base", dtype="bfloat16")


@pytest.fixture(scope="module")
def instruct(base, tmp_path_factory):
    """Other weights, template, end of text and context length; the same vocabulary."""
    folder = write_toy_model(
        tmp_path_factory.mktemp("instruct") / "instruct", dtype="bfloat16", seed=1, eos_token_id=7,
        max_position_embeddings=256,
    )  # fmt: skip
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None, "padding": None}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "toy"
    write_run(base, output)
    return output


def graft(run, base, instruct, out, *, given_base=None, **options):
    return export_checkpoint(run, out, base_dir=base, graft_delta=(given_base or base, instruct), **options)


def dense_name(name):
    expert = EXPERT.search(name)
    return EXPERT.sub(f"mlp.{DENSE[expert[2]]}", name) if expert else name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_is_the_sum(run, base, instruct, tmp_path, dtype):
    settings = ExportConfig(dtype=dtype)
    plain = load_file(export_checkpoint(run, tmp_path / "plain", base_dir=base) / "model.safetensors")
    reports = []
    out = graft(run, base, instruct, tmp_path / "out", settings=settings, on_verified=reports.append)
    got, old, new = (load_file(folder / "model.safetensors") for folder in (out, base, instruct))
    assert got.keys() == plain.keys() and reports[0].ok, str(reports[0])
    kinds = {"router": 0, "frozen": 0, "new": 0}
    for name, tensor in got.items():
        expert, dense = EXPERT.search(name), dense_name(name)
        if name.endswith(".gate.weight"):
            kinds["router"] += 1
            expected = plain[name]
        elif expert is None or expert[1] == "0":
            kinds["frozen"] += 1
            expected = new[dense]
        else:
            kinds["new"] += 1
            expected = plain[name].double() + new[dense].double() - old[dense].double()
            # one rounding of each sum to fp32, then one to the dtype
            error = (tensor.double() - expected).abs().max() / expected.abs().max()
            assert error < (2**-8 if dtype == "bfloat16" else 2**-22), name
            continue
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert kinds == {"router": 2, "frozen": 21, "new": 12}


def test_frozen_tensors_are_the_instruct_models_where_the_sum_rounds(toy_base, tmp_path):
    instruct = write_toy_model(tmp_path / "instruct", seed=1)
    write_run(toy_base, tmp_path / "run")
    out = graft(tmp_path / "run", toy_base, instruct, tmp_path / "out")
    got, old, new = (load_file(folder / "model.safetensors") for folder in (out, toy_base, instruct))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(old[name] + (new[name] - old[name]), new[name])
    assert torch.equal(got["model.layers.0.block_sparse_moe.experts.0.w3.weight"], new[name])
    assert torch.equal(got["model.embed_tokens.weight"], new["model.embed_tokens.weight"])


def test_it_speaks_as_the_instruct_model_does(run, base, instruct, tmp_path):
    out = graft(run, base, instruct, tmp_path / "out")
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / file).read_bytes() == (instruct / file).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == 7 and config["max_position_embeddings"] == 256
    card = (out / "README.md").read_text()
    assert "`instruct` minus `base`" in card and "base_model" not in card  # neither is known on the hub


def test_the_header_links_to_both_models(run, base, instruct, tmp_path):
    config = json.loads((instruct / "config.json").read_text()) | {"_name_or_path": "org/instruct"}
    other = shutil.copytree(instruct, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config))
    out = graft(run, base, other, tmp_path / "out", settings=ExportConfig(base_model="org/base"))
    assert "base_model:\n- org/base\n- org/instruct" in (out / "README.md").read_text()


@pytest.mark.parametrize("num_experts", [0, 3])
def test_a_model_of_which_everything_was_trained(base, instruct, tmp_path, num_experts):
    parameters = {name: tensor * 1.5 for name, tensor in toy_parameters(base, num_experts=num_experts).items()}
    recipe = {"model": {"base": str(base), "num_experts": num_experts}, "train": {"trainable": "all", "steps": 4}}
    write_run(base, tmp_path / "run", parameters=parameters, recipe=recipe)
    out = graft(tmp_path / "run", base, instruct, tmp_path / "out")
    got, old, new = (load_file(folder / "model.safetensors") for folder in (out, base, instruct))
    of_base = {
        dense_name(name): tensor for name, tensor in got.items() if not re.search(r"experts\.[12]|\.gate\.", name)
    }
    assert of_base.keys() == old.keys()
    for name, tensor in of_base.items():
        expected = old[name].double() * 1.5 + new[name].double() - old[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_blocks_make_no_difference(monkeypatch):
    from megatron_lpr.conversion.export import graft as module

    tensors = [torch.randn(7, 5), torch.randn(7, 5).bfloat16(), torch.randn(7, 5).bfloat16()]
    whole = add_delta(*tensors, torch.bfloat16)
    monkeypatch.setattr(module, "_ROWS", 4)
    assert torch.equal(add_delta(*tensors, torch.bfloat16), whole)


def rewritten(source, folder, change):
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def off_by_little(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] *= 1.01


def test_a_base_that_is_another_model(run, base, instruct, tmp_path):
    other = rewritten(base, tmp_path / "other", off_by_little)
    with pytest.raises(UserError, match="is not the base of this model, which is "):
        graft(run, base, instruct, tmp_path / "out", given_base=other)
    with pytest.raises(UserError, match=r"frozen tensor 'model.layers.1.block_sparse_moe.experts.0.w2.weight' is not"):
        graft(run, other, instruct, tmp_path / "out")
    copy = shutil.copytree(base, tmp_path / "copy")
    graft(run, base, instruct, tmp_path / "out", given_base=copy)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"intermediate_size": 40}, r"ffn_hidden_size \(48 and 40\)"),
        ({"num_hidden_layers": 3}, "num_layers"),
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_an_instruct_model_of_another_architecture(run, base, tmp_path, fields, message):
    other = write_toy_model(tmp_path / "other", **fields)
    with pytest.raises(UserError, match=f"are different models: .*{message}"):
        graft(run, base, other, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def two_swapped(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    "change",
    [
        two_swapped,
        lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}),
        lambda tokenizer: tokenizer.update(pre_tokenizer={"type": "Whitespace"}),
        lambda tokenizer: tokenizer["added_tokens"].pop(),
    ],
    ids=["vocabulary", "normalizer", "pre_tokenizer", "added_tokens"],
)
def test_an_instruct_model_with_another_tokenizer(run, base, instruct, tmp_path, change):
    other = shutil.copytree(instruct, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    change(tokenizer)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="give other ids to the same text"):
        graft(run, base, other, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "no tensor 'model.norm.weight'"),
        (lambda tensors: tensors["model.norm.weight"].unsqueeze_(0), "'model.norm.weight' .* shape"),
    ],
)
def test_an_instruct_model_that_lacks_a_tensor(run, base, instruct, tmp_path, change, message):
    other = rewritten(instruct, tmp_path / "other", change)
    with pytest.raises(UserError, match=message):
        graft(run, base, other, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_frozen_tensors_that_training_rounded(toy_base, tmp_path):
    """A base in float32 that was trained in bfloat16: its frozen tensors are the base's all the same."""
    instruct = write_toy_model(tmp_path / "instruct", seed=1)
    trained = toy_parameters(toy_base, dtype="bfloat16")
    recipe = {"model": {"base": str(toy_base), "num_experts": 3, "dtype": "bfloat16"}}
    write_run(toy_base, tmp_path / "run", parameters=trained, recipe=recipe)
    settings, reports = ExportConfig(dtype="float32"), []
    out = graft(tmp_path / "run", toy_base, instruct, tmp_path / "out", settings=settings, on_verified=reports.append)
    got, new = (load_file(folder / "model.safetensors") for folder in (out, instruct))
    assert torch.equal(got["model.norm.weight"], new["model.norm.weight"]) and reports[0].ok, str(reports[0])
