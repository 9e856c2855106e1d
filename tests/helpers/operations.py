"""Counts what a GPU would launch: PyTorch's operations but for views and allocations, in code that runs on a CPU."""

from torch.utils._python_dispatch import TorchDispatchMode

FREE = frozenset(
    """alias as_strided chunk detach empty empty_like empty_strided expand lift_fresh new_empty permute reshape select
    slice split split_with_sizes squeeze t transpose unbind unsqueeze view _unsafe_view _local_scalar_dense""".split()
)


class Operations(TorchDispatchMode):
    """`count`: those inside it, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))
