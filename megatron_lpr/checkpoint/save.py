"""Writing checkpoints: Megatron's dist_checkpointing (torch_dist), whole or not at all.

A checkpoint is written under a temporary name and renamed when every rank has finished, so that a killed save leaves
nothing that a later run could mistake for one.
"""

import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from megatron_lpr.checkpoint.content import Chunks, model_state, optimizer_state
from megatron_lpr.checkpoint.run_folder import drop_old, publish
from megatron_lpr.checkpoint.run_state import RunState, write_run_state


def save_checkpoint(
    output: str, state: RunState, chunks: Chunks, optimizer=None, scheduler=None, *, keep: int = 0
) -> Path:
    """Write one checkpoint from all ranks, then drop the oldest beyond `keep` (0 keeps all)."""
    root = Path(output) / "checkpoints"
    folder, writing = root / f"step_{state.step:08d}", root / f".writing_step_{state.step:08d}"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    content = model_state(chunks, state.content)
    if optimizer is not None:
        content["optimizer"] = optimizer_state(optimizer, content, is_loading=False)
        content["scheduler"] = scheduler.state_dict()
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy("torch_dist"),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    dist_checkpointing.save(content, str(writing), strategy)
    dist.barrier()
    if rank == 0:
        write_run_state(writing, state)
        publish(writing, folder)
        drop_old(folder, keep)
    dist.barrier()
    return folder
