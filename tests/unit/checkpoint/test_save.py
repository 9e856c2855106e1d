"""Checkpoints are whole or not there, frozen weights are proven unchanged, and wrong ones are refused."""

import dataclasses
import io
import pickle

import pytest
import torch
from dist_checkpoints import RunsCode, replace_object
from harness import make_plan, make_recipe, mixed_batch, unwrapped

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import CheckpointConfig


@pytest.fixture
def make_trainer(megatron, toy_base, tmp_path):
    def make(source=None, *, whole=False, **sections):
        from megatron.core import parallel_state

        from megatron_lpr.training.train import Trainer

        parallel_state.destroy_model_parallel()
        recipe = make_recipe(toy_base, mixed_batch(), tmp_path / "run", sections)
        recipe = dataclasses.replace(recipe, checkpoint=CheckpointConfig(keep=2, final_optimizer=False, whole=whole))
        trainer = Trainer(make_plan(recipe, mixed_batch(), source=source))
        for chunk in trainer.chunks:
            chunk.train()
        return trainer

    return make


ROUTERS = {"trainable": "routers"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_oldest_checkpoints_are_dropped_and_leavings_replaced(make_trainer, tmp_path):
    trainer = make_trainer(train=ROUTERS)
    root = tmp_path / "run/checkpoints"
    (root / ".writing_step_00000002").mkdir(parents=True)  # a save that was killed
    (root / ".writing_step_00000002/part").touch()
    for step in (1, 2, 3):
        trainer.step = step
        trainer.save(with_optimizer=False)
    assert names(root) == ["latest", "step_00000002", "step_00000003"]
    assert (root / "latest").read_text() == "step_00000003"
    assert not (root / "step_00000002/part").exists()


def test_weights_come_back_as_they_were(make_trainer, tmp_path):
    trainer = make_trainer(train={"trainable": "all"})
    trainer.train_step()
    trainer.save(with_optimizer=False)
    saved = {name: p.detach().clone() for name, p in unwrapped(trainer).named_parameters()}
    loaded = make_trainer(source=tmp_path / "run/checkpoints/step_00000001")
    for name, parameter in unwrapped(loaded).named_parameters():
        assert torch.equal(parameter, saved[name]), name


@pytest.mark.parametrize(
    "name", ["decoder.layers.1.mlp.frozen_experts.0.linear_fc2.weight", "decoder.final_layernorm.weight"]
)
def test_changed_frozen_weight_stops_the_save(make_trainer, tmp_path, name):
    trainer = make_trainer(train=ROUTERS)
    trainer.train_step()
    parameter = dict(unwrapped(trainer).named_parameters())[name]
    with torch.no_grad():
        parameter.view(-1).view(torch.int32)[-3] ^= 1  # the smallest change that there is
    with pytest.raises(UserError, match=f"^step 1: the frozen weight {name} on rank 0 .* has changed in memory"):
        trainer.save(with_optimizer=False)
    assert not (tmp_path / "run/checkpoints").exists()


def test_what_learns_may_change(make_trainer):
    trainer = make_trainer(train=ROUTERS)
    trainer.train_step()
    assert trainer.save(with_optimizer=False).is_dir()


@pytest.mark.parametrize("damage", ["missing", "truncated", "other model", "metadata.json", "common.pt"])
def test_damaged_checkpoint_is_refused_in_one_sentence(make_trainer, tmp_path, damage):
    make_trainer(train=ROUTERS).save(with_optimizer=False)
    folder = tmp_path / "run/checkpoints/step_00000000"
    model = {}
    match damage:
        case "missing":
            (folder / "metadata.json").unlink()
        case "truncated":
            for part in folder.glob("*.distcp"):
                part.write_bytes(part.read_bytes()[:100])
        case "other model":
            model = {"num_experts": 6}
        case "common.pt" if not (folder / damage).exists():
            pytest.skip("this Megatron-Core does not write it")
        case name:
            (folder / name).write_bytes(b"NaN")
    with pytest.raises(UserError, match=f"checkpoint {folder}: ") as error:
        make_trainer(source=folder, model=model)
    assert "\n" not in str(error.value)


def test_common_state_that_this_megatron_does_not_find(make_trainer, tmp_path):
    make_trainer(train=ROUTERS).save(with_optimizer=False)
    folder = tmp_path / "run/checkpoints/step_00000000"
    if not (folder / "common.pt").exists():
        pytest.skip("this Megatron-Core reads both forms")
    (folder / "common.pt").unlink()
    with pytest.raises(UserError, match=f"checkpoint {folder}: was written by a newer megatron-core"):
        make_trainer(source=folder)


class ExtraState:
    """What Transformer Engine's norms have and local ones have not."""

    def get_extra_state(self):
        return torch.tensor([1.0, 2.0])

    def set_extra_state(self, state):
        self.loaded_state = state


@pytest.mark.parametrize("written_with, read_with", [(True, False), (False, True), (True, True)])
def test_extra_state_is_never_asked_for(make_trainer, tmp_path, monkeypatch, written_with, read_with):
    from megatron_lpr.model.norms import SequenceParallelRMSNorm

    def equip(has_extra_state: bool) -> None:
        for name in ("get_extra_state", "set_extra_state"):
            method = getattr(ExtraState if has_extra_state else torch.nn.Module, name)
            monkeypatch.setattr(SequenceParallelRMSNorm, name, method, raising=False)

    equip(written_with)
    trainer = make_trainer(train={"trainable": "all"})
    trainer.train_step()
    trainer.save(with_optimizer=False)
    saved = {name: p.detach().clone() for name, p in unwrapped(trainer).named_parameters()}
    equip(read_with)
    loaded = unwrapped(make_trainer(source=tmp_path / "run/checkpoints/step_00000001"))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, saved[name]), name
    norm = loaded.decoder.layers[1].pre_mlp_layernorm
    assert not hasattr(norm, "loaded_state")  # Transformer Engine would unpickle it


def test_a_checkpoint_whose_metadata_runs_code_is_refused_before_it_does(make_trainer, tmp_path):
    make_trainer(train=ROUTERS).save(with_optimizer=False)
    folder = tmp_path / "run/checkpoints/step_00000000"
    (folder / ".metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"its .metadata names '_?io.open', which no checkpoint needs"):
        make_trainer(source=folder)
    assert not (tmp_path / "ran").exists()


def test_an_object_in_a_checkpoint_that_runs_code_is_refused_before_it_does(make_trainer, tmp_path):
    """The scheduler's state, where it lies: in common.pt (0.16) or among the other objects (0.19)."""
    trainer = make_trainer(train=ROUTERS)
    trainer.save(with_optimizer=False)
    folder = tmp_path / "run/checkpoints/step_00000000"
    planted = io.BytesIO()
    torch.save([RunsCode(tmp_path / "ran")], planted)
    if (folder / "common.pt").exists():
        (folder / "common.pt").write_bytes(planted.getvalue())
    else:
        replace_object(folder, "common_state/shard_0_1", planted.getvalue())
    with pytest.raises(UserError, match=f"checkpoint {folder}: cannot be loaded .*holds an object .* may run code"):
        make_trainer(source=folder)
    assert not (tmp_path / "ran").exists()


def test_every_object_of_a_checkpoint_is_loaded_without_running_it(make_trainer, tmp_path):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    make_trainer(train=ROUTERS, whole=True).save(with_optimizer=False)
    folder = tmp_path / "run/checkpoints/step_00000000"
    planted = io.BytesIO()
    torch.save([RunsCode(tmp_path / "ran")], planted)
    key = "decoder.layers.self_attention.linear_proj._extra_state"
    replace_object(folder, f"{key}/shard_0_2", planted.getvalue())
    with pytest.raises(BaseException, match="Unpickl|io.open"):
        dist_checkpointing.load({i: ShardedObject(key, None, (2,), (i,)) for i in (0, 1)}, str(folder))
    assert not (tmp_path / "ran").exists()


NEW = {
    "decoder.layers.mlp.router.weight",
    "decoder.layers.mlp.experts.experts.linear_fc1.weight",
    "decoder.layers.mlp.experts.experts.linear_fc2.weight",
}


@pytest.mark.parametrize("whole", [True, False])
def test_names_are_those_of_the_transformer_engine_spec(make_trainer, tmp_path, whole):
    """Which fuses the attention norm into the linear layer behind it, but not the norm of an MoE layer."""
    from megatron.core import dist_checkpointing

    trainer = make_trainer(train=ROUTERS, whole=whole)
    trainer.save(with_optimizer=False)
    metadata = dist_checkpointing.load_tensors_metadata(str(tmp_path / "run/checkpoints/step_00000000"))
    if not whole:
        assert set(metadata) == NEW
        return
    assert set(metadata) == NEW | {
        "embedding.word_embeddings.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.pre_mlp_layernorm.weight",
        "decoder.layers.mlp.frozen_experts.0.linear_fc1.weight",
        "decoder.layers.mlp.frozen_experts.0.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }
