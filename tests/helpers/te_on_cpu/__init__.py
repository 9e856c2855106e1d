"""NVIDIA Transformer Engine's own Python code on a machine without a GPU.

Transformer Engine (TE) is Python modules over one compiled extension, `transformer_engine_torch`. The Python is in the
wheel `transformer_engine` of 0.7 MB; the compiled part needs CUDA. This package puts plain PyTorch in the extension's
place, so that TE's modules, quantizers, recipes and optimizers, and Megatron-Core's layers on top of them, run as they
are: their control flow, autograd functions, caches, extra states and checks are the real ones. README.md beside this
file says what agreement on the emulation means, and what it does not.
"""

from te_on_cpu.calls import called, missing, reset_calls
from te_on_cpu.on_import import VARIABLE, install_on_import

__all__ = ["VARIABLE", "called", "install_on_import", "missing", "reset_calls"]
