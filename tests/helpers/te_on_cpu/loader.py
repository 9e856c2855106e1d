"""Import Transformer Engine's Python with the emulated extension."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

from te_on_cpu import cuda_facade, extension
from te_on_cpu.calls import unwritten

# TE's own modules that it imports at its top level and that need packages of a GPU machine: Triton, onnxscript
LEFT_OUT = (
    "transformer_engine.pytorch.triton.permutation",
    "transformer_engine.pytorch.triton.cross_entropy",
    "transformer_engine.pytorch.triton.pad",
    "transformer_engine.pytorch.onnx_extensions",
)


def install(te_path: str | os.PathLike) -> None:
    """Make `import transformer_engine.pytorch` work in this process; a second call changes nothing.

    Args:
        te_path: a folder that holds the package `transformer_engine` and its dist-info. It is none of the environment's
            own: without its core the package raises in every `import transformer_engine`, so also in Megatron's.
    """
    if extension.NAME in sys.modules:
        return
    path = Path(te_path).resolve()
    if not (path / "transformer_engine").is_dir():
        raise FileNotFoundError(f"{path} holds no transformer_engine: `make test-te` puts it there")
    sys.path.insert(0, str(path))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # skips the search for CUDA's libraries and for TE's own
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")  # compiling small helpers costs minutes on a CPU
    cuda_facade.install()
    sys.modules[extension.NAME] = extension.build()
    sys.meta_path.insert(0, _LeftOut())
    # the package's own __init__ would load the extension before anything could say where it is
    spec = importlib.util.find_spec("transformer_engine")
    package = sys.modules["transformer_engine"] = importlib.util.module_from_spec(spec)
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = _load_nothing
    spec.loader.exec_module(package)
    del os.environ["NVTE_PROJECT_BUILDING"]
    importlib.import_module("transformer_engine.pytorch")
    _answer_capability_checks()
    _replace(
        _get_cuda_rng_state=lambda *args, **kwargs: torch.get_rng_state(),  # for TE's checkpoint()
        _set_cuda_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        canonicalize_device=lambda device: torch.device("meta" if str(device) == "meta" else "cpu"),
    )


def _replace(**functions: Callable) -> None:
    """In every module of TE that has imported them."""
    modules = [module for name, module in sys.modules.items() if name.startswith("transformer_engine.")]
    for name, function in functions.items():
        for module in modules:
            if name in vars(module):
                setattr(module, name, function)


def _load_nothing(framework: str) -> None:
    """`torch` is there already; TE goes on without what raises ImportError."""
    if framework != "torch":
        raise ImportError(f"te_on_cpu has no {framework} extension")


class _LeftOut(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of LEFT_OUT before their files are; what is in them raises NotImplementedError when called."""

    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in LEFT_OUT else None

    def exec_module(self, module: types.ModuleType) -> None:
        def attribute(name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return unwritten(f"{module.__name__}.{name}")

        module.__getattr__ = attribute


def _answer_capability_checks() -> None:
    """Block scaling also asks for torch.version.cuda >= 12.9, which a CPU build has not."""
    quantization = importlib.import_module("transformer_engine.pytorch.quantization")
    quantization.check_fp8_block_scaling_support = lambda: (True, "")
