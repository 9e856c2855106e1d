"""The `.metadata` of a torch_dist checkpoint: which tensors it holds, in which chunks, and where these lie.

It is a pickle, and a pickle can name any function to be called while it is read. Here only the classes that describe
tensors are known; a file that names anything else is refused before anything of it is called.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_lpr.checkpoint.run_state import refuse_gone
from megatron_lpr.errors import UserError
from megatron_lpr.platform.shims import take_descriptions_with_strides

METADATA_FILE = ".metadata"
# Written by torch and by Megatron-Core 0.16 to 0.19. None of them does more than hold what it is given.
_KNOWN = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    # the plans of all ranks, with which the next save of the same layout needs no planning
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    # what each rank leaves beside its share of a save (completion.py)
    "torch.distributed.checkpoint.storage": {"WriteResult"},
    "collections": {"OrderedDict"},
}


class _Foreign(pickle.UnpicklingError):
    """The pickle names something that no description of tensors is made of."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise _Foreign(f"{module}.{name}")
        return super().find_class(module, name)


def read_description(content: bytes) -> Any:
    """A pickle of what describes tensors; pickle.UnpicklingError for one that names anything else."""
    take_descriptions_with_strides()
    return _Unpickler(io.BytesIO(content)).load()


def read_metadata(folder: str | Path) -> Metadata:
    """What a checkpoint folder holds: tensors, their chunks, and where these lie.

    UserError when the file is damaged, names a class that does not belong there, or a data file outside the folder.
    """
    try:
        metadata = read_description((Path(folder) / METADATA_FILE).read_bytes())
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        files = {str(info.relative_path) for info in metadata.storage_data.values()}
    except _Foreign as error:
        raise UserError(
            f"checkpoint {folder}: its .metadata names '{error}', which no checkpoint needs and which may run code: "
            "do not use it, and ask whoever it came from"
        ) from error
    except Exception as error:  # unpickling a damaged file raises whatever it likes
        refuse_gone(folder)
        raise UserError(
            f"checkpoint {folder}: its .metadata cannot be read ({type(error).__name__}: {error}); "
            "it is damaged, or no torch_dist checkpoint"
        ) from error
    if outside := sorted(name for name in files if name != Path(name).name):
        raise UserError(f"checkpoint {folder}: its .metadata names the file '{outside[0]}' outside the folder")
    return metadata
