"""The digests of a base's files: shared by ranks, remembered, and compared."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from megatron_lpr.checkpoint import base_files
from megatron_lpr.checkpoint.base_files import MEMORY, BaseFiles, check_base_files, check_base_sizes
from megatron_lpr.errors import UserError

SIZES = (700, 10, 300, 20, 500)


@pytest.fixture
def base(tmp_path):
    """Of several shards."""
    folder = tmp_path / "base"
    folder.mkdir()
    names = [f"model-{n:05d}-of-00005.safetensors" for n in range(len(SIZES))]
    for number, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        save_file({f"t{number}": torch.full((size,), float(number))}, folder / name)
    index = {"weight_map": {f"t{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are hashed."""
    names, hash_file = [], base_files.file_sha256
    monkeypatch.setattr(base_files, "file_sha256", lambda path: names.append(path.name) or hash_file(path))
    return names


def expected(base):
    files = sorted(base.glob("*.safetensors"))
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }


def test_digests_are_those_of_the_files(base):
    assert BaseFiles(base).digests() == expected(base)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_files_by_their_size(base, world_size):
    paths = sorted(base.glob("*.safetensors"))
    shares = [base_files._share(paths, rank, world_size) for rank in range(world_size)]
    assert sorted(path for share in shares for path in share) == paths
    load = [sum(path.stat().st_size for path in share) for share in shares]
    assert max(load) - min(load) <= max(path.stat().st_size for path in paths)


def test_what_was_hashed_is_remembered_until_it_changes(base, tmp_path, read):
    memory = tmp_path / "run"
    memory.mkdir()
    digests = BaseFiles(base, memory).digests()
    assert len(read) == 5 and len(json.loads((memory / MEMORY).read_text())) == 5
    read.clear()
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    assert BaseFiles(base, elsewhere, memory).digests() == digests and not read  # any of them may know it
    changed = base / "model-00002-of-00005.safetensors"
    os.utime(changed, ns=(1, 1))
    assert BaseFiles(base, memory).digests() == digests and read == [changed.name]
    read.clear()
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    assert BaseFiles(base, memory).digests() == expected(base) != digests and read == [changed.name]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 3}', "{"])
def test_a_damaged_memory_is_none(base, tmp_path, read, content):
    (tmp_path / MEMORY).write_text(content)
    assert BaseFiles(base, tmp_path).digests() == expected(base) and len(read) == 5


def test_a_folder_that_cannot_be_written_remembers_nothing(base, tmp_path, monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(base_files.durable, "write_text", refuse)
    assert BaseFiles(base, tmp_path).digests() == expected(base)


def test_a_file_that_cannot_be_read_is_a_sentence(base, monkeypatch):
    def fail(path):
        raise UserError(f"cannot read {path}: Input/output error")

    monkeypatch.setattr(base_files, "file_sha256", fail)
    with pytest.raises(UserError, match="cannot read .*: Input/output error"):
        BaseFiles(base).digests()


def test_another_base_is_refused(base, tmp_path, read):
    recorded = {"files": expected(base)}
    check_base_files(base, recorded, tmp_path)
    moved = base.rename(tmp_path / "moved")
    check_base_files(moved, recorded, tmp_path)
    read.clear()
    file = moved / "model-00000-of-00005.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    check_base_sizes(moved, recorded, tmp_path)
    message = f"^model.base: {moved} is not the base that the checkpoint {tmp_path} was written over "
    with pytest.raises(UserError, match=message + rf"\({file.name} has the SHA-256 \w+, not \w+\); name the folder"):
        check_base_files(moved, recorded, tmp_path)
    read.clear()
    save_file({"t0": torch.ones(3)}, file)
    with pytest.raises(UserError, match=message + rf"\({file.name} has \d+ bytes, not 2,\d+\)"):
        check_base_files(moved, recorded, tmp_path)
    recorded["files"]["model.safetensors"] = {"bytes": 1, "sha256": ""}
    with pytest.raises(UserError, match=r"\(there is no model.safetensors\)"):
        check_base_files(moved, {"files": {"model.safetensors": {"bytes": 1, "sha256": ""}}}, tmp_path)
    with pytest.raises(UserError, match="its run.json does not name the files"):
        check_base_files(moved, {}, tmp_path)
    assert not read  # sizes are looked at first
