"""Numbers on their way from the device to the host, which waits only if it comes for them too early."""

import torch


class ToHost:
    """A copy of a tensor that the device makes when it gets there; on a CPU it is there at once.

    Begun early and read after something that has waited for the device anyhow, it costs no wait of its own.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # into pinned memory
        self._made = torch.cuda.Event() if tensor.is_cuda else None
        if self._made:
            self._made.record()

    def read(self) -> torch.Tensor:
        """The copy, on the host."""
        if self._made:
            self._made.synchronize()
        return self._copy
