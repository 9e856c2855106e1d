"""The device of this process, and Megatron-Core made ready for it."""

import functools
import importlib
import importlib.util
import logging
import os
import tempfile
import threading
import warnings

import torch

from megatron_lpr.errors import UserError
from megatron_lpr.files.cores import usable_cores
from megatron_lpr.platform import shims
from megatron_lpr.platform.transformer_engine import hide_kernels, kernels_run_here

# What no user of this package can act on: optional packages that are missing, names of torch and of its own that
# Megatron uses and that are deprecated, parts of it that nothing here uses and that are experimental, how it calls
# torch's checkpointing, outputs of sharded modules that are views, which Megatron does not write to, and sequence
# parallelism inside new experts, which are not cut by tensor parallelism: around them it is on.
WARNED_NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
    "`torch.distributed.[a-z_]+` is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "FSDP2-wrapped module .* returned a view tensor",
    "MimoModelConfig is experimental",
    "torch.distributed is disabled, unavailable or uninitialized",
    "The argument order of [a-z]+ has been changed",
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
)
# The same of what is logged: a subclass of MoELayer, the model that Megatron 0.19 would have renamed, a layout of
# gradients that it then finds by itself, and CUDA's compiler on a machine without a GPU.
LOGGED_NOISE = {
    "megatron.core.transformer.transformer_layer": "Unknown MLP type",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


@functools.cache
def device() -> torch.device:
    """This rank's CUDA device, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def backend() -> str:
    """The torch.distributed backend that goes with `device()`."""
    return "nccl" if device().type == "cuda" else "gloo"


_this_thread = threading.local()


def prepare() -> None:
    """Make Megatron-Core importable, and runnable in this thread. Call it before anything of Megatron is imported.

    Raises:
        UserError: there is no temporary folder, an importable `apex` is not NVIDIA's or has no kernels, or Transformer
            Engine is half installed.
    """
    _prepare_process()
    if getattr(_this_thread, "is_prepared", False):
        return
    # each thread has a CUDA device and function modes of its own
    if device().type == "cpu":
        shims.let_cuda_mean_cpu()
    else:
        torch.cuda.set_device(device())
    _this_thread.is_prepared = True


@functools.cache
def _prepare_process() -> None:
    _refuse_no_temporary_folder()
    if kernels_run_here():
        _refuse_wrong_apex()
    else:
        hide_kernels()
    _leave_out_noise()
    on_cpu = device().type == "cpu"
    if on_cpu:
        _keep_to_usable_cores()
        shims.stand_in_for_cuda()
    else:
        _give_triton_a_folder()
    try:
        importlib.import_module("megatron.core.models.gpt")
    except RuntimeError as error:
        # a Transformer Engine without its compiled part raises RuntimeError, which Megatron lets through
        raise UserError(
            f"Transformer Engine is installed but does not load ({error}): "
            "reinstall it with its core library, or uninstall it"
        ) from None
    shims.mend_megatron(on_cpu)


def _keep_to_usable_cores() -> None:
    """torch counts cores, not what a container's quota gives of them."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())


def _give_triton_a_folder() -> None:
    """For compiled kernels. It takes the home, which a container's user may not have, and a node may not write to."""
    if {"TRITON_CACHE_DIR", "TRITON_HOME"}.isdisjoint(os.environ) and not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ["TRITON_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"triton-{os.getuid()}")


def _leave_out_noise() -> None:
    for message in WARNED_NOISE:
        warnings.filterwarnings("ignore", message=message)
    for logger in LOGGED_NOISE:
        logging.getLogger(logger).addFilter(_is_no_noise)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOGGED_NOISE[record.name])


def _refuse_no_temporary_folder() -> None:
    """As in a read-only container: Megatron's import fails without one, and so would every save."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError(
            "no folder for temporary files can be written to (/tmp, /var/tmp and the current one were tried): set "
            "TMPDIR to one, or mount one at /tmp"
        ) from None


def _refuse_wrong_apex() -> None:
    """PyPI's `apex` is a web toolkit; Megatron would take it for NVIDIA's and fail much later."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return
    folders = list(spec.submodule_search_locations or [])
    if not any(os.path.isdir(os.path.join(folder, "multi_tensor_apply")) for folder in folders):
        place = folders[0] if folders else spec.origin
        raise UserError(f"the package `apex` in {place} is not NVIDIA's Apex and breaks Megatron: pip uninstall apex")
    if importlib.util.find_spec("amp_C") is None and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            f"NVIDIA's Apex in {folders[0]} was built without its CUDA extensions, and Megatron would take it for a "
            "whole one: build it again with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or uninstall it"
        )
