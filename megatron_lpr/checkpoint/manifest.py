"""manifest.json of a checkpoint: every other file but run.json, with its size and checksum.

run.json names the manifest by its SHA-256 and itself too, so that no byte of a checkpoint changes unnoticed:

    run.json ── SHA-256 ──▶ run.json, manifest.json ── XXH3 ──▶ .metadata, common.pt, metadata.json, __0_0.distcp, ...
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lpr.checkpoint.shape import ManifestJson, misfit
from megatron_lpr.files import durable
from megatron_lpr.files.checksum import Checksum

MANIFEST = "manifest.json"
SEAL = "digest"  # of run.json: the SHA-256 of all the rest of it


def write_manifest(folder: Path, files: Mapping[str, Checksum]) -> str:
    """Write the manifest of a checkpoint, on the disk on return; returns its SHA-256."""
    listed = {name: dataclasses.asdict(files[name]) for name in sorted(files)}
    text = json.dumps({"version": 1, "files": listed}, indent=1)
    durable.write_text(folder / MANIFEST, text)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path, digest: str) -> dict[str, Checksum] | None:
    """What the manifest lists; None where it is not there, not the one with this SHA-256, or no manifest."""
    try:
        content = (folder / MANIFEST).read_bytes()
        tree = json.loads(content)
    except PermissionError:
        raise  # no damage
    except (OSError, ValueError, RecursionError):
        return None
    if hashlib.sha256(content).hexdigest() != digest or misfit(ManifestJson, tree) is not None:
        return None
    return {name: Checksum(size=entry["size"], xxh3_128=entry["xxh3_128"]) for name, entry in tree["files"].items()}


def sealed(tree: Mapping[str, Any]) -> str:
    """The text of a run.json, with the digest of itself."""
    tree = {key: value for key, value in tree.items() if key != SEAL}
    return _text(tree | {SEAL: hashlib.sha256(_text(tree).encode()).hexdigest()})


def _text(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False)
