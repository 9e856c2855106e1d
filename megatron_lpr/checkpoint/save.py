"""Writing checkpoints: Megatron's dist_checkpointing (torch_dist), whole or not at all.

A checkpoint is written under a temporary name and renamed when every rank has finished, so that a killed save leaves
nothing that could be mistaken for one:

    start()   plan, values to the host       all ranks, at a step boundary
              threads write the shares       training goes on, where nobody waits
    finish()  what was written is gathered   all ranks, at a step boundary; rank 0 writes .metadata, manifest.json and
                                             run.json, renames the folder, lets `latest` name it (completion.py),
                                             drops old ones
"""

import pickle
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_lpr.checkpoint.completion import Written, complete, described, make_writing_folder, run_note
from megatron_lpr.checkpoint.content import Chunks, model_state
from megatron_lpr.checkpoint.optimizer_state import written_state
from megatron_lpr.checkpoint.run_folder import WRITING, drop_old
from megatron_lpr.checkpoint.run_state import RunState
from megatron_lpr.checkpoint.share import HostBuffers, PlanOnly, ShareWriter, Values, structure
from megatron_lpr.errors import UserError
from megatron_lpr.platform import device


def save_checkpoint(output: str, state: RunState, chunks: Chunks) -> Path:
    """Write one checkpoint of weights alone, from all ranks; returns its folder."""
    writer = CheckpointWriter(output)
    writer.start(state, chunks)
    return writer.finish()


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; all ranks call it at the same steps."""

    def __init__(self, output: str, *, keep: int = 0, keep_every: int = 0) -> None:
        """keep, keep_every: as of `drop_old`."""
        self._root, self._keep, self._keep_every = Path(output) / "checkpoints", keep, keep_every
        self._buffers = HostBuffers()
        self._share: ShareWriter | None = None
        self._deleting: threading.Thread | None = None  # old checkpoints, on rank 0
        self._strategy: FullyParallelSaveStrategyWrapper | None = None  # knows who writes what of
        self._entries: list[Any] = []  # these
        self._told: SavePlan | None = None  # the plan that rank 0 has of this rank
        self._plans: list[SavePlan] = []  # of all ranks, on rank 0, and the tensors that they come to
        self._tensors: Metadata | None = None

    def start(self, state: RunState, chunks: Chunks, optimizer=None, scheduler=None, *, to_host: bool = False) -> Path:
        """Begin to write a checkpoint of this moment; returns the folder that it will be.

        to_host: copy what is written, so that training can go on; without it nothing may change before `finish`.
        """
        assert self._share is None, "a checkpoint is being written"
        self._state, self._to_host = state, to_host
        self._folder, self._writing = (self._root / f"{prefix}step_{state.step:08d}" for prefix in ("", WRITING))
        self._on_first_rank(self._make_room)
        content = model_state(chunks, state.content)
        items, learned = written_state(optimizer, content) if optimizer is not None else ([], [])
        if scheduler is not None:
            content["scheduler"] = scheduler.state_dict()
        plan, values, small = self._planned(content)
        self._plan, values = replace(plan, items=[*plan.items, *items]), [*values, *learned]
        if to_host:
            values = self._buffers.take(self._plan, values)
        elif torch.cuda.is_available():
            torch.cuda.synchronize()
        note = run_note(self._root, state, dist.get_world_size()) if dist.get_rank() == 0 else {}
        self._share = ShareWriter(self._writing, self._plan, values, small, note)
        self._share.start(self._buffers if to_host else None)
        return self._folder

    def _planned(self, content: dict[str, Any]) -> tuple[SavePlan, list[Values], dict[str, bytes]]:
        """What this rank writes but for the optimizer: its share, and small files that Megatron would write at once.

        Who writes what is agreed on anew only where what there is has changed on some rank.
        """
        entries = structure(content)
        is_known = torch.tensor([int(entries == self._entries and self._strategy is not None)], device=device())
        dist.all_reduce(is_known, dist.ReduceOp.MIN)
        if not is_known.item():
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            self._strategy = FullyParallelSaveStrategyWrapper(PlanOnly(), group, do_cache_distribution=True)
            self._entries = entries
        assert self._strategy is not None
        with tempfile.TemporaryDirectory() as beside:  # where the small files of Megatron cannot fail on rank 0 alone
            dist_checkpointing.save(content, beside, self._strategy, validate_access_integrity=not is_known.item())
            small = {path.name: path.read_bytes() for path in sorted(Path(beside).iterdir())}
        share: PlanOnly = self._strategy.base_strategy
        values, share.values = share.values, []  # the device's memory is not for keeping them
        return share.plan, values, small

    @property
    def step(self) -> int | None:
        """Of the checkpoint that is being written; None: none is."""
        return self._state.step if self._share else None

    @property
    def has_ended(self) -> bool:
        """Whether this rank has written its share, or failed to."""
        return self._share is not None and self._share.has_ended

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write its share."""
        return self._share is not None and self._share.has_failed

    def finish(self) -> Path:
        """Wait for the checkpoint that is being written, and give it its name; returns its folder.

        Raises:
            UserError: it could not be written, on some rank; the same on all ranks.
        """
        assert self._share is not None, "no checkpoint is being written"
        written, self._share = self._share.wait(), None
        # on its own, or .metadata would be pickled in another way where it shares objects with what was written
        plan = None if self._plan == self._told else pickle.dumps(self._plan)
        self._told = self._plan
        shares: list[Any] = [None] * dist.get_world_size()
        dist.gather_object((plan, written), shares if dist.get_rank() == 0 else None)
        self._on_first_rank(lambda: self._publish(*map(list, zip(*shares, strict=True))))
        return self._folder

    def _make_room(self) -> None:
        if self._deleting:
            self._deleting.join()
        make_writing_folder(self._writing)

    def _publish(self, plans: list[bytes | None], shares: list[Written]) -> None:
        if faults := [f"{fault} (rank {rank})" for rank, share in enumerate(shares) for fault in sorted(share.faults)]:
            raise OSError(0, faults[0])
        if any(plans):
            self._plans = [pickle.loads(new) if new else self._plans[rank] for rank, new in enumerate(plans)]
            self._tensors = described(self._plans)
        assert self._tensors is not None
        complete(self._writing, self._folder, self._tensors, shares, self._state)
        dropped = drop_old(self._folder, self._keep, self._keep_every)
        self._deleting = threading.Thread(target=_delete, args=(dropped,), name="deletes checkpoints")
        self._deleting.start()  # a large one takes seconds to delete
        if not self._to_host:
            self._deleting.join()

    def _on_first_rank(self, step: Callable[[], None]) -> None:
        """step() on rank 0, which all wait for; an OSError there is a UserError on all."""
        told: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                step()
            except OSError as error:
                name = Path(error.filename).name + " cannot be written: " if error.filename else ""
                told = [f"{name}{error.strerror}"]
                shutil.rmtree(self._writing, ignore_errors=True)  # it may be what fills the disk
        dist.broadcast_object_list(told)
        if told[0] is not None:
            raise UserError(
                f"checkpoint {self._folder}: {told[0]}; the checkpoints before it are whole: make room or give the "
                "right to write there, and start the run again"
            )


def _delete(folders: list[Path]) -> None:
    """What cannot be deleted has no name of a checkpoint any more, and the next start of the run tries again."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
