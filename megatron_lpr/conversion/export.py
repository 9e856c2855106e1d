"""Export: a stream of whole tensors becomes a stock Hugging Face checkpoint, or no folder at all.

Two sources share one writer: the parameters of a trained Megatron model (`export_model`) and a dense HF
checkpoint upcycled offline, without building a Megatron model (`upcycle_hf`).
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from megatron_lpr.conversion.export_config import export_config
from megatron_lpr.conversion.families import Architecture, family_of, read_architecture
from megatron_lpr.conversion.folders import complete_folder, copy_companions
from megatron_lpr.conversion.hf_config import read_config
from megatron_lpr.conversion.hf_io import SafetensorsReader, ShardedWriter, torch_dtype
from megatron_lpr.conversion.mappings import take_apart
from megatron_lpr.conversion.model_card import model_card
from megatron_lpr.conversion.names import parse
from megatron_lpr.conversion.origins import (
    check_experts,
    check_upcycling,
    initial_tensor,
    origins,
    with_layers_kept_dense,
    with_shared_expert,
    zero_tensors,
)
from megatron_lpr.conversion.upcycle import check_checkpoint

MAX_SHARD_BYTES = 5 * 10**9

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def export_model(
    tensors: NamedTensors,
    arch: Architecture,
    *,
    base_dir: str | Path,
    out_dir: str | Path,
    num_experts: int = 0,
    num_frozen: int = 0,
    topk: int = 2,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    original_languages: Sequence[str] = (),
    expanded_languages: Sequence[str] = (),
) -> Path:
    """Writes a trained model as the family's stock MoE class (`num_experts` > 0) or as its dense class again.

    tensors: (global Megatron name, whole tensor), each once, in any order. Layers are numbered globally;
        `...mlp.experts.local_experts.I...` counts I over all new experts, so it becomes expert `num_frozen +
        I`. The head of a model with tied embeddings is left out.
    base_dir: the dense model that training started from; its tokenizer and generation files are copied byte
    for byte. dtype: of the export, default that of the base model. num_frozen: experts 0..num_frozen-1 are
    the frozen ones. Returns `out_dir`. UserError when it exists and is not empty, when the disk is full or
    when a tensor never came; then nothing is left behind.
    """
    return _write_folder(
        itertools.chain(to_hf(tensors, arch, num_frozen=num_frozen), zero_tensors(arch, num_experts)),
        arch,
        base_dir=base_dir,
        out_dir=out_dir,
        num_experts=num_experts,
        num_frozen=num_frozen,
        topk=topk,
        dtype=dtype or arch.dtype,
        max_shard_bytes=max_shard_bytes,
        card=model_card(
            base=Path(base_dir).name,
            num_experts=num_experts,
            num_frozen=num_frozen,
            topk=topk,
            original_languages=original_languages,
            expanded_languages=expanded_languages,
        ),
    )


def upcycle_hf(
    base_dir: str | Path,
    out_dir: str | Path,
    *,
    num_experts: int,
    num_frozen: int = 1,
    topk: int = 2,
    router_std: float = 0.02,
    seed: int = 0,
    mlp_only_layers: Sequence[int] = (),
    shared_expert_size: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Upcycles a HF checkpoint into the family's stock MoE class, tensor by tensor, without Megatron.

    The result computes what a dense model computes (for one that has experts already see origins.py) and equals
    what `load_dense` followed by `export_model` writes. mlp_only_layers, shared_expert_size: see
    `with_layers_kept_dense` and `with_shared_expert`.
    """
    arch = with_shared_expert(with_layers_kept_dense(read_architecture(base_dir), mlp_only_layers), shared_expert_size)
    check_upcycling(arch, num_experts=num_experts, num_frozen=num_frozen, topk=topk)
    reader = SafetensorsReader(base_dir)
    check_checkpoint(reader, arch)
    return _write_folder(
        _upcycled(reader, arch, num_experts=num_experts, router_std=router_std, seed=seed),
        arch,
        base_dir=base_dir,
        out_dir=out_dir,
        num_experts=num_experts,
        num_frozen=num_frozen,
        topk=topk,
        dtype=dtype or arch.dtype,
        max_shard_bytes=max_shard_bytes,
        card=model_card(
            base=Path(base_dir).name, num_experts=num_experts, num_frozen=num_frozen, topk=topk, trained=False
        ),
    )


def to_hf(tensors: NamedTensors, arch: Architecture, *, num_frozen: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Renames and unpacks whole Megatron parameters into HF tensors, one parameter at a time."""
    family = family_of(arch)
    for megatron_name, tensor in tensors:
        name = parse(megatron_name)
        if name.role == "router":
            yield family.router_name(name.layer), tensor
            continue
        mapping = family.find(name.role, name.weight)
        expert = name.expert
        if name.role == "frozen_expert":
            assert expert < num_frozen, megatron_name
        elif name.role == "new_expert":
            expert += num_frozen
        shapes = [arch.shape(dims) for dims in mapping.hf.values()]
        parts = take_apart(tensor.detach(), mapping.kind, shapes, groups=arch.num_query_groups)
        yield from zip(family.hf_names(mapping, role=name.role, layer=name.layer, expert=expert), parts, strict=True)


def _upcycled(
    reader: SafetensorsReader, arch: Architecture, *, num_experts: int, router_std: float, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, origin in origins(arch, num_experts).items():
        tensor = initial_tensor(
            name, origin, reader, arch, num_experts=num_experts, router_std=router_std, seed=seed
        )
        yield name, tensor


def _write_folder(
    hf_tensors: NamedTensors,
    arch: Architecture,
    *,
    base_dir: str | Path,
    out_dir: str | Path,
    num_experts: int,
    num_frozen: int,
    topk: int,
    dtype: str,
    max_shard_bytes: int,
    card: str,
) -> Path:
    if num_experts:
        check_experts(num_experts=num_experts, num_frozen=num_frozen, topk=topk)
    shapes = family_of(arch).shapes(arch, num_experts)
    config = export_config(arch, read_config(base_dir), num_experts=num_experts, topk=topk, dtype=dtype)
    with complete_folder(out_dir) as folder:
        writer = ShardedWriter(folder, shapes, dtype=torch_dtype(dtype), max_shard_bytes=max_shard_bytes)
        for name, tensor in hf_tensors:
            writer.write(name, tensor)
        writer.close()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(base_dir, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Path(out_dir)
