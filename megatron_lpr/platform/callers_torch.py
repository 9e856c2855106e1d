"""What the caller of this package has set in torch."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def callers_torch_set_aside() -> Iterator[None]:
    """Inside it torch is as in a new process: gradients, no autocast, tensors on the CPU unless told otherwise."""
    with contextlib.ExitStack() as inside:
        inside.enter_context(torch.inference_mode(False))
        inside.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            inside.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # a context costs time at every call
            inside.enter_context(torch.device("cpu"))
        yield
