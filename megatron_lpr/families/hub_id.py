"""The name of a model on the Hugging Face hub, where its folder tells it."""

import re
from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.families.hf_config import read_config

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHE_FOLDER = re.compile(r"models--(.+?)--(.+)")


def check_hub_id(name: str, field: str) -> str:
    """UserError unless `name` can be a hub id."""
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{field}: '{name}' is no hub id; write it as organisation/name")
    return name


def hub_id(hf_dir: str | Path) -> str | None:
    """`organisation/name`, of the hub's own cache or as config.json says where the model came from; None: unknown."""
    folder = Path(hf_dir).resolve()
    for parent in (folder, *folder.parents):
        if cached := _CACHE_FOLDER.fullmatch(parent.name):
            return f"{cached[1]}/{cached[2]}"
    name = read_config(hf_dir).get("_name_or_path")
    is_id = isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if is_id else None
