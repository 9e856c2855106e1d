"""A checkpoint as Hugging Face tensors: what export writes, and what verification compares an export with."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lpr.conversion.export.graft import GraftedSource, check_own_base
from megatron_lpr.conversion.export.sources import CheckpointSource, Source
from megatron_lpr.conversion.record import Made
from megatron_lpr.families import Architecture, read_architecture
from megatron_lpr.families.origins import with_layers_kept_dense, with_shared_expert


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """arch: of the export. hf_dir: whose config, tokenizer and frozen tensors it has: the base's, or instruct's."""

    arch: Architecture
    hf_dir: Path
    source: Source


def trained_model(
    folder: Path,
    made: Made,
    *,
    base_dir: str | Path,
    dtype: str,
    shared_expert_size: int | None = None,
    graft_delta: Sequence[str | Path] | None = None,
) -> TrainedModel:
    """The model in the checkpoint `folder`. UserError when it, the base and the models to graft do not fit.

    base_dir: the HF model that training started from. dtype: of the export. graft_delta: (BASE, INSTRUCT).
    """
    arch = with_layers_kept_dense(read_architecture(base_dir), made.mlp_only_layers)
    arch = with_shared_expert(arch, shared_expert_size)
    source = CheckpointSource(folder, arch, num_experts=made.num_experts, num_frozen=made.num_frozen_experts)
    if not graft_delta:
        return TrainedModel(arch=arch, hf_dir=Path(base_dir), source=source)
    check_own_base(graft_delta[0], base_dir)
    instruct = Path(graft_delta[1])
    grafted = GraftedSource(
        source,
        arch,
        base_dir=graft_delta[0],
        instruct_dir=instruct,
        num_experts=made.num_experts,
        num_frozen=made.untouched,
        dtype=dtype,
    )
    theirs = read_architecture(instruct)
    arch = dataclasses.replace(arch, max_position_embeddings=theirs.max_position_embeddings, dtype=theirs.dtype)
    return TrainedModel(arch=arch, hf_dir=instruct, source=grafted)
