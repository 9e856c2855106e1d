"""Put the emulation in place when `transformer_engine` is first imported, in this process and in those it starts."""

import importlib
import importlib.machinery
import os
import sys
from pathlib import Path

VARIABLE = "TE_ON_CPU"  # names the folder with Transformer Engine's Python
EXTENSION = "transformer_engine_torch"
STARTED_WITH = Path(__file__).parent / "started_processes"  # has the sitecustomize.py of processes


class InstallOnImport:
    """A finder on sys.meta_path: nothing is imported, torch neither, before Transformer Engine is asked for."""

    needs_no_gpu = True  # of what it loads; megatron_lpr asks the compiled part's loader

    def find_spec(self, name, path, target=None):
        if name == EXTENSION:
            return importlib.machinery.ModuleSpec(name, self)
        if name != "transformer_engine":
            return None
        sys.meta_path.remove(self)
        importlib.import_module("te_on_cpu.loader").install(os.environ[VARIABLE])
        sys.modules[EXTENSION].__spec__ = importlib.machinery.ModuleSpec(EXTENSION, self)
        spec = sys.modules[name].__spec__  # import would take this one whatever is returned, and load it again
        spec.loader = self
        return spec

    def create_module(self, spec):
        importlib.import_module("transformer_engine")  # of the extension alone: it comes with the package
        return sys.modules[spec.name]

    def exec_module(self, module) -> None: ...


def install_on_import() -> bool:
    """Whether the variable asks for the emulation, which is then there for this process and for those it starts."""
    if not os.environ.get(VARIABLE):
        return False
    if not any(isinstance(finder, InstallOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, InstallOnImport())
    os.environ[VARIABLE] = str(Path(os.environ[VARIABLE]).resolve())  # a process may start in another folder
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(STARTED_WITH) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTED_WITH), *(path for path in paths if path)])
    return True
