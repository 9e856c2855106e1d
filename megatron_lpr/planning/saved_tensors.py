"""Counts the bytes that autograd keeps for backward passes: each storage once, however often it is saved."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, Self

import torch
from torch import Tensor

from megatron_lpr.planning.gathered_weights import GatheredWeights

Kind = Literal["activations", "logits", "working"]


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Inside it what is saved is counted, and what is let go.

    Attributes:
        peaks: most bytes at once: of the logits, of what a backward pass has computed again, and of everything else.
    """

    def __init__(self, parameters: Iterable[Tensor], gathered: GatheredWeights, vocabulary: int) -> None:
        """
        Args:
            parameters: which lie there anyway, and everything else in their storages.
            gathered: which is counted for itself.
            vocabulary: columns of the logits on this rank; a tensor with rows of so many is theirs.
        """
        super().__init__(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor)
        self._not_counted = {_storage(parameter) for parameter in parameters}
        self._gathered = gathered
        self._vocabulary = vocabulary
        self._times: Counter[int] = Counter()  # that a storage is saved
        self._kinds: dict[int, Kind] = {}  # of a storage
        self._now: Counter[Kind] = Counter()
        self.peaks: Counter[Kind] = Counter()

    def __enter__(self) -> Self:  # type: ignore[override]  # torch's gives nothing
        super().__enter__()
        return self

    def add(self, tensor: Tensor) -> None:
        """One more reference to the tensor's storage."""
        storage = _storage(tensor)
        if storage in self._not_counted or storage in self._gathered.storages:
            return
        self._times[storage] += 1
        if self._times[storage] == 1:
            kind = self._kinds[storage] = self._kind(tensor)
            self._now[kind] += tensor.untyped_storage().nbytes()
            self.peaks[kind] = max(self.peaks[kind], self._now[kind])

    def remove(self, tensor: Tensor) -> None:
        """One reference less."""
        storage = _storage(tensor)
        if storage in self._not_counted or storage in self._gathered.storages:
            return
        self._times[storage] -= 1
        if not self._times[storage]:
            self._now[self._kinds[storage]] -= tensor.untyped_storage().nbytes()

    def _kind(self, tensor: Tensor) -> Kind:
        if tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            return "logits"
        in_backward_pass = torch._C._current_graph_task_id() != -1
        return "working" if in_backward_pass else "activations"


class _Saved:
    """What autograd holds instead of a saved tensor; it lets go of it where the graph does."""

    def __init__(self, counter: SavedTensors, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor.detach()
        counter.add(self.tensor)

    def __del__(self) -> None:
        self.counter.remove(self.tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
