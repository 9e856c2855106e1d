"""Watches FSDP2 (torch 2.11 to 2.15) gather weights and let go: bytes at once, and which collectives are its."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group


class GatheredWeights(ExitStack):
    """Inside it gathered weights are counted: what a collective returns, and the weights that are copied from it.

    Weights in FP8 are counted with what they are transposed to.

    Attributes:
        peak: most bytes of them at once.
        storages: where they lie, also while they are empty.
        is_sending: whether the collective that is called right now gathers them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.storages: set[int] = set()
        self.is_sending = False
        self._now: dict[int, int] = {}  # bytes of each

    def __enter__(self) -> Self:
        super().__enter__()
        parameter, group = _fsdp_param.FSDPParam, _fsdp_param_group
        for owner, name, exchange in (
            (parameter, "init_all_gather_outputs", self._counted_all),
            (parameter, "alloc_all_gather_outputs", self._counted_all),
            (parameter, "init_unsharded_param", self._counted_all),
            (parameter, "free_unsharded_param", self._counted_all),
            (group, "foreach_all_gather", self._sending),
        ):
            self.enter_context(mock.patch.object(owner, name, exchange(getattr(owner, name))))
        return self

    def _counted_all(self, change: Callable) -> Callable:
        def changed(parameter: Any, *args: Any, **kwargs: Any) -> Any:
            result = change(parameter, *args, **kwargs)
            for tensor in (*parameter.all_gather_outputs, *getattr(parameter, "_unsharded_inner_tensors", ())):
                self._count(tensor)
            return result

        return changed

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages.add(storage._cdata)
        self._hold(storage._cdata, storage.nbytes())

    def _hold(self, what: int, size: int) -> None:
        self._now[what] = size
        self.peak = max(self.peak, sum(self._now.values()))

    def _sending(self, gather: Callable) -> Callable:
        def sending(*args: Any, **kwargs: Any) -> Any:
            self.is_sending = True
            result = gather(*args, **kwargs)
            self.is_sending = False
            if result is not None:
                output = result.all_gather_output
                self._hold(id(output), output.untyped_storage().nbytes())
                weakref.finalize(output, self._now.pop, id(output))
            return result

        return sending
