"""From a checkpoint to a folder: what is in it, what is refused, and that nothing half-written is left."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_run import toy_parameters, write_run

from megatron_lpr.checkpoint.own_recipe import own_recipe
from megatron_lpr.checkpoint.same_run import base_identity
from megatron_lpr.conversion.export import export
from megatron_lpr.conversion.export.export import export_checkpoint, export_model
from megatron_lpr.conversion.export.sources import CheckpointSource
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.token_routing import plan_routing
from megatron_lpr.families import read_architecture
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.files.safetensors_io import SafetensorsReader, ShardedWriter
from megatron_lpr.recipe.settings import ExportConfig
from megatron_lpr.testing.toy_models import write_toy_model


@pytest.fixture(scope="module")
def run(toy_base, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "toy"
    write_run(toy_base, output)
    return output


def tensors(folder):
    reader = SafetensorsReader(folder)
    return {name: reader.get(name) for name in reader.keys()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_exports_as_the_parameters_in_memory_do(run, toy_base, tmp_path):
    reports = []
    out = export_checkpoint(run, tmp_path / "a", base_dir=toy_base, on_verified=reports.append)
    parameters = toy_parameters(toy_base)
    other = export_model(
        parameters.items(),
        read_architecture(toy_base),
        Expansion(num_experts=3, num_frozen=1),
        base_dir=toy_base,
        out_dir=tmp_path / "b",
    )
    assert same(load_file(out / "model.safetensors"), load_file(other / "model.safetensors"))
    assert reports[0].ok and "12 of 12 tensors differ" in str(reports[0])


def test_dense_checkpoint(toy_base, tmp_path):
    parameters = toy_parameters(toy_base, num_experts=0)
    recipe = {"model": {"base": str(toy_base), "num_experts": 0}}
    write_run(toy_base, tmp_path / "run", parameters=parameters, recipe=recipe)
    out = export_checkpoint(tmp_path / "run", tmp_path / "out", base_dir=toy_base, on_verified=print)
    assert same(tensors(out), tensors(toy_base))


def test_several_shards_hold_the_same_tensors(run, toy_base, tmp_path):
    one = export_checkpoint(run, tmp_path / "one", base_dir=toy_base, settings=ExportConfig(dtype="bfloat16"))
    settings = ExportConfig(dtype="bfloat16", max_shard_size="30KB")
    many = export_checkpoint(run, tmp_path / "many", base_dir=toy_base, settings=settings)
    assert same(tensors(one), tensors(many))
    shards = list(many.glob("*.safetensors"))
    largest = max(tensor.nbytes for tensor in tensors(many).values())
    assert len(shards) > 2 and all(sum(t.nbytes for t in load_file(s).values()) <= max(30_000, largest) for s in shards)
    assert (one / "config.json").read_bytes() == (many / "config.json").read_bytes()


def test_a_truncated_checkpoint_leaves_no_folder(run, toy_base, tmp_path):
    folder = tmp_path / "c"
    write_run(toy_base, folder)
    for file in (folder / "checkpoints/step_00000004").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:30000])
    with pytest.raises(UserError, match="distcp has 30,000 bytes in place of"):
        export_checkpoint(folder, tmp_path / "out", base_dir=toy_base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def without(name):
    return lambda parameters: {key: value for key, value in parameters.items() if not key.endswith(name)}


def renamed(old, new):
    return lambda parameters: {key.replace(old, new): value for key, value in parameters.items()}


def changed(name, change):
    return lambda parameters: {key: change(value) if key.endswith(name) else value for key, value in parameters.items()}


@pytest.mark.parametrize(
    "damage, message",
    [
        (without("router.weight"), "lacks model.layers.0.block_sparse_moe.gate.weight"),
        (without("local_experts.1.linear_fc2.weight"), "lacks model.layers.0.block_sparse_moe.experts.2.w2.weight"),
        (renamed("linear_proj.weight", "linear_prog.weight"), "'decoder.layers.0.self_attention.linear_prog.weight'"),
        (renamed("frozen_experts.0", "frozen_experts.1"), "frozen_experts.1.linear_fc1.weight' .* has no place"),
        (lambda p: p | {"decoder.layers.0.self_attention.linear_qkv.bias": torch.zeros(64)}, "linear_qkv.bias"),
        (lambda p: p | {"output_layer.bias": torch.zeros(384)}, r"output_layer.bias' \[384\] has no place"),
        (changed("linear_qkv.weight", lambda w: w[:-1].clone()), r"linear_qkv.weight' \[63, 32\] has no place"),
        (changed("linear_fc2.weight", lambda w: w[:, :-1].clone()), "linear_fc2.weight"),
        (changed("word_embeddings.weight", lambda w: w[:256].clone()), r"word_embeddings.weight' \[256, 32\]"),
    ],
)
def test_a_checkpoint_that_is_not_all_of_the_model_is_refused_first(toy_base, tmp_path, damage, message, monkeypatch):
    write_run(toy_base, tmp_path / "run", parameters=damage(toy_parameters(toy_base)))
    monkeypatch.setattr(export, "complete_folder", None)
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "run", tmp_path / "out", base_dir=toy_base)


def test_an_expert_too_many(toy_base, tmp_path):
    write_run(toy_base, tmp_path / "run", parameters=toy_parameters(toy_base, num_experts=4))
    with pytest.raises(UserError, match="router.weight.* has no place"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", base_dir=toy_base)


def test_every_tensor_of_an_export_was_written_by_it(run, toy_base, tmp_path, monkeypatch):
    """A poisoned run: shards full of NaN before the first tensor comes; none may be left."""
    start = ShardedWriter._start_shard

    def poisoned(self, file, names):
        start(self, file, names)
        path = self.folder / file
        first = min(self._place[name][1] for name in names)
        with open(path, "r+b") as shard:
            shard.seek(first)
            shard.write(b"\xff" * (path.stat().st_size - first))

    monkeypatch.setattr(ShardedWriter, "_start_shard", poisoned)
    out = export_checkpoint(run, tmp_path / "out", base_dir=toy_base, settings=ExportConfig(max_shard_size="40KB"))
    assert all(tensor.isfinite().all() for tensor in tensors(out).values())


def one_ulp(parameters):
    weight = parameters["decoder.layers.1.mlp.frozen_experts.0.linear_fc2.weight"]
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(torch.inf))
    return parameters


def test_an_export_that_fails_its_verification_does_not_appear(toy_base, tmp_path, capsys):
    write_run(toy_base, tmp_path / "run", parameters=one_ulp(toy_parameters(toy_base)))
    with pytest.raises(UserError, match="was not written.*frozen tensors: 20 of 21"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", base_dir=toy_base, on_verified=print)
    assert "FAIL  frozen tensors" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export_checkpoint(tmp_path / "run", tmp_path / "out", base_dir=toy_base)  # nobody asked
    assert (tmp_path / "out/config.json").is_file()


def test_a_disk_that_fills_up(run, toy_base, tmp_path):
    """A file system of 300 KB, on which something else grows while the export writes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        stream = CheckpointSource.stream

        def greedy(self, units):
            for number, item in enumerate(stream(self, units)):
                if number == 3:
                    (disk / "other").write_bytes(bytes(150_000))
                yield item

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CheckpointSource, "stream", greedy)
            with pytest.raises(UserError, match="cannot write .*No space left"):
                export_checkpoint(run, disk / "out", base_dir=toy_base)
        assert [path.name for path in disk.iterdir()] == ["other"]
        with pytest.raises(UserError, match="GB free, the checkpoint needs"):
            export_checkpoint(run, disk / "out", base_dir=toy_base)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_with_the_last_file(run, toy_base, tmp_path, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="cannot write .*No space left"):
            export_checkpoint(run, tmp_path / "out", base_dir=toy_base)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from megatron_lpr.conversion.export import export
from megatron_lpr.conversion.export.sources import CheckpointSource
stream = CheckpointSource.stream
def slow(self, units):
    for item in stream(self, units):
        yield item
        print("one", flush=True)
        time.sleep(60)
CheckpointSource.stream = slow
export.export_checkpoint(sys.argv[1], sys.argv[2], base_dir=sys.argv[3])
"""


def test_a_killed_export_leaves_what_the_next_one_replaces(run, toy_base, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(run), str(out), str(toy_base)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "one\n"
    with pytest.raises(UserError, match="another process is writing"):
        export_checkpoint(run, out, base_dir=toy_base)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [".out.incomplete"]
    (tmp_path / ".out.incomplete" / "stale.safetensors").write_bytes(b"x")
    export_checkpoint(run, out, base_dir=toy_base)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "stale.safetensors").exists()
    with pytest.raises(UserError, match="exists and is not empty"):
        export_checkpoint(run, out, base_dir=toy_base)


@pytest.mark.parametrize("size", ["many", "0", "-1GB", "nanMB", "infGB"])
def test_impossible_sizes(run, toy_base, tmp_path, size):
    with pytest.raises(UserError, match="is no size"):
        export_checkpoint(run, tmp_path / "out", base_dir=toy_base, settings=ExportConfig(max_shard_size=size))


def test_base_of_another_shape(run, tmp_path):
    other = write_toy_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(UserError, match="was it trained from another one"):
        export_checkpoint(run, tmp_path / "out", base_dir=other)


def test_dry_run_checks_and_writes_nothing(run, toy_base, tmp_path):
    export_checkpoint(run, tmp_path / "out", base_dir=toy_base, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    other = write_toy_model(tmp_path / "other", intermediate_size=40)
    with pytest.raises(UserError, match="was it trained from another one"):
        export_checkpoint(run, tmp_path / "out", base_dir=other, dry_run=True)


def test_config_and_card_name_the_run(run, toy_base, tmp_path):
    out = export_checkpoint(run, tmp_path / "out", base_dir=toy_base, command="megatron-lpr export x")
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 3
    assert "    megatron-lpr export x" in (out / "README.md").read_text()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_base_with_the_same_weights_and_another_config_or_tokenizer_is_refused(toy_base, tmp_path, file):
    base = shutil.copytree(toy_base, tmp_path / "base")
    identity = base_identity(str(base), read_architecture(base))
    folder = write_run(base, tmp_path / "run", base=identity)
    recipe = own_recipe(folder, ["evaluation.window=32"])
    plan_routing(folder, recipe).check()  # as evaluate does
    changed = json.loads((base / file).read_text())
    if file == "config.json":
        changed["rope_theta"] = 20000.0
        what = r"the config.json of .*base is not the one .*20000.0 for 10000.0"
    else:
        vocabulary = changed["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        what = rf"the tokenizer in .*base is not the one .*\(sha256 {identity['tokenizer'][:12]}, now "
    (base / file).write_text(json.dumps(changed))
    with pytest.raises(UserError, match=f"model.base: {what}"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", base_dir=base)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=what):
        plan_routing(folder, recipe).check()
