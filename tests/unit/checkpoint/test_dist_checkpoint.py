"""Parameters of distributed checkpoints in many cuts, against the tensors that were cut."""

import pickle

import pytest
import torch
from dist_checkpoints import RunsCode, grid, write_dist_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from megatron_lpr.checkpoint.dist_checkpoint import DistCheckpoint
from megatron_lpr.errors import UserError

FC1, ROUTER = "decoder.layers.mlp.experts.experts.linear_fc1.weight", "decoder.layers.mlp.router.weight"
TENSORS = {
    "embedding.word_embeddings.weight": torch.randn(12, 4),
    ROUTER: torch.randn(2, 3, 4),
    FC1: torch.randn(2, 4, 6, 4),
    "decoder.final_layernorm.weight": torch.randn(4),
    "optimizer.state.exp_avg." + ROUTER: torch.randn(2, 3, 4),
    "optimizer.state.param." + ROUTER: torch.randn(2, 3, 4),
}
CUTS = {
    "whole": {},
    "as Megatron cuts": {FC1: grid((2, 4, 6, 4), (2, 4, 2, 1)), ROUTER: grid((2, 3, 4), (2, 1, 1))},
    "rows and columns": {
        FC1: grid((2, 4, 6, 4), (1, 2, 3, 2)),
        "embedding.word_embeddings.weight": grid((12, 4), (3, 2)),
    },
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("transposed", [(), (FC1, ROUTER)], ids=["by_row", "by_column"])
def test_parameters_are_the_slices_of_what_was_saved(tmp_path, cut, transposed):
    checkpoint = DistCheckpoint(write_dist_checkpoint(tmp_path / "c", TENSORS, CUTS[cut], transposed=transposed))
    expected = {
        "embedding.word_embeddings.weight": TENSORS["embedding.word_embeddings.weight"],
        "decoder.final_layernorm.weight": TENSORS["decoder.final_layernorm.weight"],
    }
    for layer in range(2):
        expected[f"decoder.layers.{layer}.mlp.router.weight"] = TENSORS[ROUTER][layer]
        for expert in range(4):
            name = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight"
            expected[name] = TENSORS[FC1][layer, expert]
    assert checkpoint.keys() == expected.keys()
    for name, tensor in expected.items():
        stored = checkpoint[name]
        assert stored.shape == tuple(tensor.shape) and stored.dtype == tensor.dtype
        assert torch.equal(stored.narrow(0, 0, len(tensor)), tensor)
        assert torch.equal(stored.narrow(0, 1, 2), tensor[1:3])
        ranges = [(start, stop) for stop in range(len(tensor) + 1) for start in range(stop)]
        in_place = {(start, stop): stored.on_disk(0, start, stop - start) for start, stop in ranges}
        for (start, stop), found in in_place.items():
            assert torch.equal(stored.narrow(0, start, stop - start), tensor[start:stop])
            assert found is None or torch.equal(found[:], tensor[start:stop])
        assert any(in_place.values()) or cut == "rows and columns" or transposed
        if tensor.ndim == 2:
            in_place = stored.on_disk(1, 0, tensor.shape[1])
            assert in_place is None or torch.equal(in_place[:], tensor)
            assert stored.on_disk(1, 1, 3) is None
            assert torch.equal(stored.narrow(1, 1, 3), tensor[:, 1:4])


@pytest.mark.parametrize("cut", CUTS)
def test_a_box_of_a_tensor(tmp_path, cut):
    checkpoint = DistCheckpoint(write_dist_checkpoint(tmp_path / "c", TENSORS, CUTS[cut]))
    box = [(1, 5), (1, 3)]
    assert torch.equal(checkpoint.tensor(FC1, (1, 2)).read(box), TENSORS[FC1][1, 2, 1:5, 1:3])
    assert torch.equal(checkpoint.tensor(FC1).read([(0, 2), (1, 2), *box]), TENSORS[FC1][:, 1:2, 1:5, 1:3])
    for key in (key for key in TENSORS if "optimizer" in key):
        assert torch.equal(checkpoint.tensor(key, (1,)).read([(0, 2), (3, 4)]), TENSORS[key][1, :2, 3:]), key


def test_layers_that_differ_are_saved_one_by_one(tmp_path):
    tensors = {
        "decoder.layers.0.mlp.linear_fc1.weight": torch.randn(6, 4),
        "decoder.layers.1.mlp.router.weight": torch.randn(3, 4),
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight": torch.randn(2, 6, 4),
    }
    checkpoint = DistCheckpoint(write_dist_checkpoint(tmp_path / "c", tensors))
    expert = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
    assert set(checkpoint) == {
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.router.weight",
        expert.replace(".1.linear", ".0.linear"),
        expert,
    }
    saved = tensors["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
    assert torch.equal(checkpoint[expert].narrow(0, 0, 6), saved[1])


def test_one_layer_of_a_stack_is_read_alone(tmp_path):
    """A chunk of all layers is not read whole: with the others' bytes cut off, the first layer can still be read."""
    folder = write_dist_checkpoint(tmp_path / "c", {FC1: torch.randn(4, 8, 64, 64)}, files=1)
    checkpoint = DistCheckpoint(folder)
    name = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    first = checkpoint[name].narrow(0, 0, 64)  # where the chunk begins is known now
    path = checkpoint[name].checkpoint.open_chunk(checkpoint[name].shards[0].chunk).path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    assert torch.equal(checkpoint[name].narrow(0, 0, 64), first)


def test_an_opened_checkpoint_goes_to_another_process(tmp_path):
    checkpoint = DistCheckpoint(write_dist_checkpoint(tmp_path / "c", TENSORS))
    again = pickle.loads(pickle.dumps(checkpoint))
    assert list(again) == list(checkpoint)


def test_a_chunk_that_is_not_there(tmp_path):
    cuts = {FC1: grid((2, 4, 6, 4), (2, 4, 2, 1))[:-1]}
    checkpoint = DistCheckpoint(write_dist_checkpoint(tmp_path / "c", TENSORS, cuts))
    with pytest.raises(UserError, match="parts of .* are missing"):
        checkpoint["decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"].narrow(0, 0, 6)


@pytest.mark.parametrize("damage", ["gone", "truncated", "garbage"])
def test_damaged_file(tmp_path, damage):
    folder = write_dist_checkpoint(tmp_path / "c", TENSORS, files=1)
    file = folder / "__0_0.distcp"
    match damage:
        case "gone":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:100])
        case "garbage":
            file.write_bytes(bytes(file.stat().st_size))
    checkpoint = DistCheckpoint(folder)
    with pytest.raises(UserError, match="__0_0.distcp"):
        checkpoint["decoder.layers.0.mlp.router.weight"].narrow(0, 0, 3)


@pytest.mark.parametrize("content", [None, b"", b"not a pickle"])
def test_folder_that_is_no_checkpoint(tmp_path, content):
    if content is not None:
        (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"its .metadata cannot be read"):
        DistCheckpoint(tmp_path)


@pytest.mark.parametrize("where", ["state_dict_metadata", "planner_data", "storage_meta", "anything"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_metadata_that_runs_code_is_refused_before_it_does(tmp_path, where, protocol):
    metadata = Metadata({}, None, {})
    setattr(metadata, where, RunsCode(tmp_path / "ran"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    with pytest.raises(UserError, match=r"names '_?io.open', which no checkpoint needs"):
        DistCheckpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_a_newer_torch(tmp_path, monkeypatch):
    """2.15 writes the strides of a stored tensor too, which torch before it does not unpack."""
    getstate = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*getstate(self)[:5], (4, 1)))
    folder = write_dist_checkpoint(tmp_path / "c", TENSORS)
    assert DistCheckpoint(folder)["embedding.word_embeddings.weight"].shape == (12, 4)
    FileSystemReader(folder).read_metadata()  # as training reads it


def test_a_metadata_that_reads_another_folder(tmp_path):
    folder = write_dist_checkpoint(tmp_path / "c", TENSORS)
    text = (folder / ".metadata").read_bytes()
    metadata = pickle.loads(text)
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"'\.\./__0_0.distcp' outside the folder"):
        DistCheckpoint(folder)


@pytest.mark.parametrize("content", [pickle.dumps({}), pickle.dumps(Metadata({}, None, None))])
def test_a_metadata_that_describes_no_tensors(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"its .metadata cannot be read"):
        DistCheckpoint(tmp_path)
