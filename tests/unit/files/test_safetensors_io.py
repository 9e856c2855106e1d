"""Reader and writer against safetensors' own functions, and damaged inputs."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lpr.errors import UserError
from megatron_lpr.files import safetensors_io
from megatron_lpr.files.new_folder import complete_folder
from megatron_lpr.files.safetensors_io import SafetensorsReader, ShardedWriter, torch_dtype

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(5.0) + 100,
    "c": torch.arange(6.0).reshape(2, 3) - 1,
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def write(folder, max_shard_bytes=10**6, names="cab", dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    writer = ShardedWriter(folder, SHAPES, dtype=dtype, max_shard_bytes=max_shard_bytes)
    for name in names:
        writer.write(name, TENSORS[name])
    writer.close()
    return folder


def test_single_file_is_what_safetensors_reads(tmp_path):
    loaded = load_file(write(tmp_path) / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_keep_to_the_budget_and_the_index_finds_all(tmp_path):
    write(tmp_path, max_shard_bytes=48)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 4 * (12 + 5 + 6)
    reader = SafetensorsReader(tmp_path)
    assert reader.keys() == list(TENSORS)
    assert all(torch.equal(reader.get(name), TENSORS[name]) for name in TENSORS)


def test_a_tensor_above_the_budget_gets_its_own_shard(tmp_path):
    write(tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_written_in_the_dtype_of_the_checkpoint(tmp_path):
    reader = SafetensorsReader(write(tmp_path, dtype=torch.bfloat16))
    assert reader.dtype("a") == torch.bfloat16
    assert torch.equal(reader.get("b"), TENSORS["b"].bfloat16())


def test_slices_of_rows_and_columns(tmp_path):
    reader = SafetensorsReader(write(tmp_path))
    assert torch.equal(reader.slice("a")[1:3], TENSORS["a"][1:3])
    assert torch.equal(reader.slice("a")[:, 1:2], TENSORS["a"][:, 1:2])
    assert reader.shape("a") == (3, 4)


def test_a_tensor_that_was_not_written_keeps_the_checkpoint_open(tmp_path):
    with pytest.raises(UserError, match="1 of 3 tensors were never written, the first is 'b'"):
        write(tmp_path, names="ac")


def test_no_tensor_is_written_twice_or_misshapen(tmp_path):
    writer = ShardedWriter(tmp_path, SHAPES, dtype=torch.float32, max_shard_bytes=100)
    writer.write("a", TENSORS["a"])
    for name, tensor in [("a", TENSORS["a"]), ("b", TENSORS["a"]), ("x", TENSORS["a"])]:
        with pytest.raises(AssertionError):
            writer.write(name, tensor)


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_refused_first(tmp_path):
    with pytest.raises(UserError, match="GB free, the checkpoint needs"):
        ShardedWriter(tmp_path, {"a": (2**40, 2**10)}, dtype=torch.float32, max_shard_bytes=1)


def test_a_disk_that_fills_up_is_an_error_for_the_user(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    writer = ShardedWriter(tmp_path, SHAPES, dtype=torch.float32, max_shard_bytes=10**6)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*No space left"):
        writer.write("a", TENSORS["a"])


def test_no_weights_and_unknown_tensor(tmp_path):
    with pytest.raises(UserError, match="holds neither model.safetensors"):
        SafetensorsReader(tmp_path)
    with pytest.raises(UserError, match="no tensor 'x'"):
        SafetensorsReader(write(tmp_path)).get("x")


def test_truncated_file(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged or truncated"):
        SafetensorsReader(tmp_path)


def test_a_file_that_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    """As another user's, in a container: the library takes it for missing."""

    def refused(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    write(tmp_path)
    monkeypatch.setattr(safetensors_io, "open", refused, raising=False)  # to root every file is readable
    with pytest.raises(PermissionError, match="model.safetensors"):
        SafetensorsReader(tmp_path)


def test_missing_shard_and_index_that_lies(tmp_path):
    write(tmp_path, max_shard_bytes=48)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"b": TENSORS["b"]}, second)
    with pytest.raises(UserError, match="lacks the tensor 'c'"):
        SafetensorsReader(tmp_path).get("c")
    second.unlink()
    with pytest.raises(UserError, match="lacks the shard model-00002"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": ["a"]}, "its weight_map names no tensors"),
        ({"weight_map": {}}, "its weight_map names no tensors"),
        ({"weight_map": None}, "its weight_map names no tensors"),
        ({"weight_map": {"a": 3}}, "names '3': a shard is a .safetensors file inside"),
        ({"weight_map": {"a": "../x.safetensors"}}, "names '../x.safetensors': a shard is"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd': a shard is"),
        ({"weight_map": {"a": "config.json"}}, "names 'config.json': a shard is"),
        ([], "is not a safetensors index"),
        (3, "is not a safetensors index"),
    ],
)
def test_an_index_that_is_none_or_points_elsewhere(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as refused:
        SafetensorsReader(tmp_path)
    assert message in str(refused.value)


def test_integer_weights_are_refused(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is I8; supported"):
        SafetensorsReader(tmp_path).dtype("a")


def test_unknown_dtype():
    with pytest.raises(UserError, match="'int8' is not supported"):
        torch_dtype("int8")


def test_folder_is_complete_or_not_there(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), complete_folder(out) as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    with complete_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not (out / "file").exists()
    assert (out / "file").read_text() == "x"
    with pytest.raises(UserError, match="exists and is not empty"), complete_folder(out):
        pass
    assert [path.name for path in out.parent.iterdir()] == ["out"]
