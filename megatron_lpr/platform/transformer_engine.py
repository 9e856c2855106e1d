"""Packages of kernels for GPUs, Transformer Engine and Apex: whether they can compute here, and how to do without."""

import importlib.util
import sys

import torch

_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")


def lacking_for_transformer_engine() -> str | None:
    """What its modules need and do not have here, as the end of a sentence about them; None where they run.

    A login node may have a cluster's packages and no GPU: there it is as if they were not installed.
    """
    if not kernels_run_here():
        return "needs a GPU, and this machine shows none: take another"
    if importlib.util.find_spec("transformer_engine") is None:
        return "needs Transformer Engine: pip install 'megatron-lpr[te]'"
    return None


def kernels_run_here() -> bool:
    """Whether there is a GPU, or plain PyTorch in the place of Transformer Engine's compiled part.

    Who puts it there, as the tests do, says so at the loader of that module, before anything is imported.
    """
    if torch.cuda.is_available():
        return True
    compiled = importlib.util.find_spec("transformer_engine_torch")
    return compiled is not None and getattr(compiled.loader, "needs_no_gpu", False)


def hide_kernels() -> None:
    """Before the import of Megatron: make each import of these packages an ImportError, as if they were not installed.

    Megatron takes Adam, norms and gradient norms from what it can import, and asks for no GPU: the kernels would find
    no device in the first step. And where they do not even load, the error may be one that Megatron lets through.
    """
    loaded = [module for module in sys.modules if module.startswith(tuple(f"{name}." for name in _PACKAGES))]
    for name in (*_PACKAGES, *loaded):
        sys.modules[name] = None  # type: ignore[assignment]
