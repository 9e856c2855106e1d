"""What is said before a run about the room for its checkpoints."""

from types import SimpleNamespace

from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.files import output_place
from megatron_lpr.training.good_checkpoint import largest_checkpoint, short_of_room


def test_room_for_all_that_are_kept(toy_base, tmp_path, monkeypatch):
    def sentences(free, **settings):
        monkeypatch.setattr(output_place.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        recipe = make_recipe(toy_base, mixed_batch(), tmp_path, {"checkpoint": {"keep": 3} | settings})
        return list(short_of_room(make_plan(recipe, mixed_batch()), tmp_path))

    size = largest_checkpoint(make_plan(make_recipe(toy_base, mixed_batch(), tmp_path, {}), mixed_batch()))
    assert sentences(4 * size) == []
    [sentence] = sentences(4 * size - 1)
    assert sentence.startswith("checkpoint.keep: 3 checkpoints and the one being written take 0.0 GB more in ")
    assert sentences(0, keep=0) == sentences(0, every_minutes=0) == []
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001/part").write_bytes(bytes(size))
    assert sentences(3 * size) == []
