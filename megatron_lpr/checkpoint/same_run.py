"""What makes a run the run it is: compared before any process group when it resumes, or starts from another run's end.

A resumed run may change how far and how fast it learns (train.steps, optimizer), how the work is spread over ranks
(parallel, micro-batches, recomputation), what it writes (checkpoint, logging, evaluation, export), and where things
lie. What the model is, what learns and what it minimises may not change. Of the data the sampler says itself what it
has read already (data_state.py).
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_lpr.checkpoint.run_state import RunState, locate, read_run_state, step_of
from megatron_lpr.checkpoint.source import source_identity
from megatron_lpr.data.text.tokenizer_file import tokenizer_file
from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.files.digest import file_sha256
from megatron_lpr.files.file_tensor import tensor_bytes
from megatron_lpr.files.safetensors_io import INDEX_FILE, SINGLE_FILE, SafetensorsReader
from megatron_lpr.recipe.reading import flat, from_tree, to_tree
from megatron_lpr.recipe.settings import Recipe

_EXPERTS = ("model.num_experts", "model.num_frozen_experts", "model.topk", "model.mlp_only_layers")
_ROUTERS = ("model.router_init_std", "model.router_init_seed")  # exports and model cards tell them
_OBJECTIVE = ("train.trainable", "train.global_batch_size", "balance.coeff", "balance.group", "lpr.coeff", "lpr.loss")
_FIXED = (*_EXPERTS, *_ROUTERS, "model.dtype", *_OBJECTIVE, "data.reset_attention")
_SAMPLED_TENSORS, _SAMPLED_BYTES = 64, 4096


def resumed_state(folder: Path) -> RunState:
    """run.json of the checkpoint that a run goes on from.

    Raises:
        UserError: it counts otherwise than the run did, which would go on with other samples.
    """
    state = read_run_state(folder)
    train, data = state.recipe["train"], state.data_state or {}
    samples = state.step * train["global_batch_size"] if train else state.consumed_samples
    counted = {
        "step": (state.step, step_of(folder)),
        "consumed_samples": (state.consumed_samples, samples),
        "data_state.consumed_samples": (data.get("consumed_samples", samples), samples),
    }
    for name, (stated, is_so) in counted.items():
        if stated != is_so:
            raise UserError(
                f"checkpoint {folder}: run.json is damaged ({name} is {stated:,}, and must be {is_so:,}); put it back, "
                f"or let {folder.parent / 'latest'} name another checkpoint"
            )
    return state


def check_resumed(recipe: Recipe, state: RunState, base: Mapping[str, Any]) -> None:
    """Compare a recipe with the run of `state`, which it would go on with.

    Raises:
        UserError: it is another model or another experiment, or the run cannot go on.
    """
    train = recipe.train
    assert train is not None
    if not state.recipe["train"]:
        raise UserError(
            f"output: {recipe.output} holds a converted model, not a training run; choose another folder, and name "
            "this one in model.load"
        )
    if state.step > train.steps:
        raise UserError(
            f"train.steps: {train.steps}, but the run in {recipe.output} has made {state.step} already; "
            "raise it, or start a new run in another folder"
        )
    finished = state.step == train.steps
    old, new = flat(state.recipe), flat(to_tree(recipe))
    fixed = list(_FIXED)
    if recipe.balance.coeff and recipe.balance.group == "micro_batch":
        fixed.append("train.micro_batch_size")  # the groups of the balance loss
    if finished:  # nothing is left to learn with another setting
        fixed += [field for field in new if field.startswith("optimizer.")]
    mend = "restore it, or start a new run in another output folder"
    model = (*_EXPERTS, *_ROUTERS)  # another model takes no weights of this one
    takes_weights = [field for field in fixed if field not in model]
    _compare(model, old, new, f"the run in {recipe.output}", mend)
    _compare(takes_weights, old, new, f"the run in {recipe.output}", f"{mend} (model.load takes the weights)")
    _check_base(recipe, state.base, base, f"the run in {recipe.output}")
    _check_load(recipe, state)
    if not finished and not state.has_optimizer:
        raise UserError(
            f"output: the run in {recipe.output} ended at step {state.step} without optimizer state "
            "(checkpoint.final_optimizer: false) and cannot be extended; start a new one with model.load"
        )


def check_source(recipe: Recipe, folder: Path, base: Mapping[str, Any]) -> None:
    """Compare a recipe with the checkpoint that gives its weights.

    Raises:
        UserError: that checkpoint holds another model, or its routers were made in another way than the recipe says:
            they are there already, and exports would tell what was not done.
    """
    state = read_run_state(folder)
    old, new = flat(state.recipe), flat(to_tree(recipe))
    mend = "restore it, or name another checkpoint in model.load (without one the run starts from model.base)"
    _compare(_EXPERTS, old, new, f"the checkpoint {folder}", mend)
    for field in _ROUTERS:
        if recipe.model.num_experts and old.get(field, new[field]) != new[field]:
            raise UserError(
                f"{field}: {new[field]} has no effect on the checkpoint {folder}, whose routers were made with "
                f"{old[field]}; set that, or leave model.load out to upcycle the base model anew"
            )
    _check_base(recipe, state.base, base, f"the checkpoint {folder}")


def rounded(recipe: Recipe, folder: Path) -> str | None:
    """A warning where the weights of a checkpoint lose digits in this run's dtype."""
    there = read_run_state(folder).recipe["model"]["dtype"]
    if (there, recipe.model.dtype) == ("float32", "bfloat16"):
        return f"model.dtype: bfloat16 rounds the float32 weights of {folder}, frozen ones too"
    return None


def changed_settings(recipe: Recipe, state: RunState) -> list[str]:
    """`section.key: old -> new` of what a resumed run changes; never silent.

    A setting that the run of an older version did not have was what is the default now.
    """
    try:
        old = flat(to_tree(from_tree(Recipe, dict(state.recipe), where="run.json")))
    except UserError:  # it has settings that are gone, or values that are refused by now
        old = flat(state.recipe)
    new = flat(to_tree(recipe))
    return [f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value]


def base_identity(folder: str, arch: Architecture, tokenizer: str | None = None) -> dict[str, Any]:
    """What tells one base model from another, wherever it lies and however it is cut into files: its numbers, a
    SHA-256 over names, shapes and a sample of the weights, and its tokenizer's (None where there are none).

    tokenizer: the last, where it is known already.
    """
    weights = None
    if any((Path(folder) / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
        reader, digest = SafetensorsReader(folder), hashlib.sha256()
        names = sorted(reader.keys())
        for name in names[:: max(1, len(names) // _SAMPLED_TENSORS)]:
            digest.update(f"{len(names)} {name} {reader.shape(name)}".encode())
            if shape := reader.shape(name):
                row = reader.slice(name)[shape[0] // 2 : shape[0] // 2 + 1]
                assert isinstance(row, torch.Tensor)
                digest.update(tensor_bytes(row)[:_SAMPLED_BYTES])
        weights = digest.hexdigest()
    return {"architecture": to_tree(arch), "weights": weights, "tokenizer": tokenizer or _tokenizer_digest(folder)}


def _tokenizer_digest(folder: str | Path) -> str | None:
    try:
        file = tokenizer_file(Path(folder))
    except UserError:
        return None  # a base that nothing is tokenised for needs none
    return file_sha256(file)


def _compare(fields: Iterable[str], old: Mapping[str, Any], new: Mapping[str, Any], what: str, mend: str) -> None:
    for field in fields:
        if field in old and old[field] != new[field]:  # an older version may not have had it
            raise UserError(f"{field}: {new[field]}, but {what} has {old[field]}; {mend}")


def _check_base(recipe: Recipe, there: Mapping[str, Any], here: Mapping[str, Any], what: str) -> None:
    differing = _differing(there["architecture"], here["architecture"])
    if there["weights"] and here["weights"] and there["weights"] != here["weights"]:
        differing.append("other weights")
    tokenizers = [base["tokenizer"] for base in (there, here)]
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        differing.append("another tokenizer")
    if differing:
        raise UserError(
            f"model.base: {recipe.model.base} is another model than the base of {what} ({', '.join(differing)}); name "
            "that one, wherever it lies now, or start a new run in another output folder"
        )


def check_config_and_tokenizer(base: str | Path, arch: Architecture, checkpoint: Path) -> None:
    """Raises UserError where a base has another config or tokenizer than in the run of a checkpoint.

    The weights alone do not tell: with another theta of RoPE they are another function, with another tokenizer their
    rows are other tokens'.
    """
    there = read_run_state(checkpoint).base
    mend = "restore it, or name the folder that has it (model.base, --base)"
    if differing := _differing(there["architecture"], to_tree(arch)):
        raise UserError(
            f"model.base: the config.json of {base} is not the one that the run of {checkpoint} had "
            f"({', '.join(differing)}); {mend}"
        )
    old = there["tokenizer"]
    if old and (new := _tokenizer_digest(base)) != old:
        is_now = f"now {new[:12]}" if new else "there is none"
        raise UserError(
            f"model.base: the tokenizer in {base} is not the one that the run of {checkpoint} had "
            f"(sha256 {old[:12]}, {is_now}); {mend}"
        )


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{field} {new[field]} for {old[field]}" for field in new if old.get(field, new[field]) != new[field]]


def _check_load(recipe: Recipe, state: RunState) -> None:
    """Another name in `model.load` is accepted where it leads to the same checkpoint."""
    old, new = state.recipe["model"]["load"], recipe.model.load
    if old == new:
        return
    if new and state.source and source_identity(locate(new).folder)["run"] == state.source["run"]:
        return
    raise UserError(
        f"model.load: {new or 'not set'}, but the run in {recipe.output} started from {old or 'the base model'}; "
        "restore it, or start a new run in another output folder"
    )
