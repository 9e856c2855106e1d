"""The output folder of a run with one checkpoint, written by the formats and without Megatron."""

from pathlib import Path

import torch
from dist_checkpoints import write_dist_checkpoint
from fake_checkpoints import BASE, seal

from megatron_lpr.checkpoint.run_state import RunState
from megatron_lpr.families import read_architecture
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.files.safetensors_io import SafetensorsReader, torch_dtype
from megatron_lpr.model.load.upcycle import load_dense
from megatron_lpr.recipe.reading import from_tree, to_tree
from megatron_lpr.recipe.settings import Recipe


def toy_parameters(base, *, num_experts=3, num_frozen=1, dtype="float32", trained=True):
    """Parameters of an upcycled Llama (dense: 0 experts) as training leaves them: new experts and routers moved."""
    arch = read_architecture(base)
    hidden, ffn, rows = arch.hidden_size, arch.ffn_hidden_size, -(-arch.vocab_size // 128) * 128
    heads = arch.num_attention_heads * arch.head_dim
    shapes = {"embedding.word_embeddings.weight": (rows, hidden)}
    for layer in (f"decoder.layers.{number}." for number in range(arch.num_layers)):
        shapes[layer + "self_attention.linear_qkv.layer_norm_weight"] = (hidden,)
        shapes[layer + "self_attention.linear_qkv.weight"] = (heads + 2 * arch.num_query_groups * arch.head_dim, hidden)
        shapes[layer + "self_attention.linear_proj.weight"] = (hidden, heads)
        shapes[layer + "pre_mlp_layernorm.weight"] = (hidden,)
        ffns = ["mlp."]
        if num_experts:
            shapes[layer + "mlp.router.weight"] = (num_experts, hidden)
            ffns = [f"mlp.frozen_experts.{n}." for n in range(num_frozen)]
            ffns += [f"mlp.experts.local_experts.{n}." for n in range(num_experts - num_frozen)]
        for name in ffns:
            shapes[layer + name + "linear_fc1.weight"] = (2 * ffn, hidden)
            shapes[layer + name + "linear_fc2.weight"] = (hidden, ffn)
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not arch.tie_word_embeddings:
        shapes["output_layer.weight"] = (rows, hidden)
    parameters = {name: torch.full(shape, torch.nan, dtype=torch_dtype(dtype)) for name, shape in shapes.items()}
    load_dense(
        parameters.items(),
        SafetensorsReader(base),
        arch,
        Expansion(num_experts=num_experts, num_frozen=num_frozen, router_std=0.1),
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        if trained and (".local_experts." in name or ".router." in name):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return parameters


def stacked(parameters):
    """As Megatron saves them: layers on the first axis, new experts on the second."""
    groups = {}
    for name, parameter in parameters.items():
        parts = name.split(".")
        key = [part for place, part in enumerate(parts) if not (part.isdigit() and parts[place - 1] in AXES)]
        groups.setdefault(".".join(key).replace("experts.local_experts", "experts.experts"), []).append(parameter)
    layers = len(next(group for key, group in groups.items() if key.endswith("pre_mlp_layernorm.weight")))
    tensors = {}
    for key, group in groups.items():
        if key.startswith("decoder.layers."):
            group = torch.stack(group)
            tensors[key] = group.unflatten(0, (layers, -1)) if "experts.experts" in key else group
        else:
            (tensors[key],) = group
    return tensors


AXES = ("layers", "local_experts")


def write_run(base, output: Path, /, *, parameters=None, recipe=(), **state) -> Path:
    """A run of 4 steps in `output`; `recipe` and `state` replace entries of its run.json. Returns its checkpoint."""
    tree = {"name": "toy", "output": str(output), "model": {"base": str(base), "num_experts": 3}} | dict(recipe)
    resolved = to_tree(from_tree(Recipe, tree, where="test"))
    if parameters is None:
        model = resolved["model"]
        parameters = toy_parameters(base, num_experts=model["num_experts"], num_frozen=model["num_frozen_experts"])
    folder = output / "checkpoints" / "step_00000004"
    folder.parent.mkdir(parents=True)
    write_dist_checkpoint(folder, stacked(parameters))
    run = {"step": 4, "consumed_samples": 8, "has_optimizer": False, "recipe": resolved, "base": BASE} | state
    seal(folder, RunState(**run))
    (folder.parent / "latest").write_text(folder.name)
    return folder
