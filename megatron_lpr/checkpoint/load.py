"""Reading checkpoints of any layout into the model, the optimizer and its schedule."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lpr.checkpoint.common_state import refuse_newer
from megatron_lpr.checkpoint.content import Chunks, model_state
from megatron_lpr.checkpoint.dist_checkpoint import DistCheckpoint
from megatron_lpr.checkpoint.holding import holds
from megatron_lpr.checkpoint.optimizer_state import load_state
from megatron_lpr.checkpoint.run_state import read_run_state, refuse_gone
from megatron_lpr.errors import UserError
from megatron_lpr.platform.shards import is_sharded

EXTRA_STATE = "_extra_state"


def load_checkpoint(folder: Path, chunks: Chunks, optimizer=None, scheduler=None) -> None:
    """Fill what the checkpoint holds of the model, and the optimizer and schedule where they are given; at any layout.

    Sharded parameters are passed over: each rank reads its rows by itself (model/load/row_shards.py).

    Raises:
        UserError: the checkpoint is damaged or holds another model.
    """
    held = read_run_state(folder).content
    content = model_state(chunks, held)
    for index in range(len(chunks)):
        content[f"model{index}"] = _without_extra_state(content[f"model{index}"])
    stored = DistCheckpoint(folder)  # refuses what would run code in Megatron's hands
    refuse_newer(folder)
    try:
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(folder)),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        loaded = dist_checkpointing.load(content, str(folder), strategy, strict=StrictHandling.RAISE_UNEXPECTED)
    except (Exception, CheckpointException) as error:  # unpickling a damaged file raises whatever it likes
        refuse_gone(folder)
        raise UserError(f"checkpoint {folder}: cannot be loaded into this model: {_reason(error)}") from error
    for index, chunk in enumerate(chunks):
        own = loaded.get(f"model{index}", {})  # Megatron drops what is empty: a chunk without experts may hold nothing
        model = unwrap_model(chunk)
        others = {name for name, parameter in model.named_parameters() if is_sharded(parameter)}
        differing = model.load_state_dict(own, strict=False)
        weights = [key for keys in differing for key in keys if holds(held, key) and not _is_extra_state(key)]
        weights = [key for key in weights if key not in others]
        assert not weights, f"loaded weights do not fit the model: {weights}"
    if optimizer is not None:
        if "scheduler" not in loaded:
            raise UserError(
                f"checkpoint {folder}: does not hold the state of the learning rate (common.pt); copy it again, or "
                "give another checkpoint of the run"
            )
        # moments and steps are the checkpoint's, learning rate and Adam's settings the recipe's
        scheduler.load_state_dict(loaded["scheduler"])
        load_state(optimizer, model_state(chunks, held), stored, step=scheduler.num_steps)


def _without_extra_state(model: dict[str, Any]) -> dict[str, Any]:
    """Ask for weights alone, not for the extra state (FP8 scales), which no recipe makes use of, nor for sharded ones.

    Transformer Engine's modules have one where the local ones have none, as in norms: a checkpoint written with one
    spec would not load with the other. And Transformer Engine unpickles it, whatever it is.
    """
    return {name: entry for name, entry in model.items() if not _is_extra_state(name) and not isinstance(entry, list)}


def _is_extra_state(name: str) -> bool:
    """Of a module, or of one of the experts of a grouped one, which are numbered from the second on."""
    return name.rpartition(".")[2].startswith(EXTRA_STATE)


def _reason(error: BaseException) -> str:
    """In one line; torch collects the failures of all ranks in one exception, of which the first is told."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, UnpicklingError):
        return "it holds an object that is damaged or may run code: do not use it, and ask whoever it came from"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
