"""Whether two runs ended in the same bytes: weights, optimizer and losses."""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_lpr.checkpoint.metadata_file import read_metadata
from megatron_lpr.checkpoint.run_state import checkpoint_folder
from megatron_lpr.reporting.metrics_log import read_metrics


def checkpoint_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer of a run's last checkpoint, whole, by their names in it."""
    folder = checkpoint_folder(str(run))
    tensors = {
        key: torch.empty(described.size, dtype=described.properties.dtype)
        for key, described in read_metadata(folder).state_dict_metadata.items()
        if isinstance(described, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # that it is one process
        dcp.load(tensors, checkpoint_id=str(folder), no_dist=True)
    return tensors


def differences(run: Path, other: Path) -> list[str]:
    """What differs between two runs at their ends: tensors by name, and the steps whose losses are not the same."""
    ours, theirs = checkpoint_tensors(run), checkpoint_tensors(other)
    found = [f"only one has {key}" for key in sorted(ours.keys() ^ theirs.keys())]
    found += [key for key in sorted(ours.keys() & theirs.keys()) if not torch.equal(ours[key], theirs[key])]
    losses = [
        {record["step"]: record["ntp_loss"] for record in read_metrics(r / "metrics.jsonl")} for r in (run, other)
    ]
    steps = sorted(losses[0].keys() | losses[1].keys())
    return found + [f"loss of step {step}" for step in steps if losses[0].get(step) != losses[1].get(step)]
