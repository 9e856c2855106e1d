"""Python's garbage is collected after the steps that the recipe says, and by Python again after the run."""

import gc

import pytest
from harness import make_plan, make_recipe, mixed_batch


@pytest.mark.parametrize("ends", ["finishes", "fails"])
def test_collections(megatron, toy_base, tmp_path, monkeypatch, ends):
    from megatron_lpr.training.hooks.hook import Hook
    from megatron_lpr.training.train import Trainer

    seen = []

    class Look(Hook):
        def before_step(self, trainer):
            assert not gc.isenabled()
            monkeypatch.setattr(gc, "collect", lambda: seen.append(trainer.step))

        def after_step(self, trainer, metrics):
            if ends == "fails" and trainer.step == 4:
                raise KeyboardInterrupt

    train = {"steps": 5, "collect_garbage_every": 2}
    recipe = make_recipe(toy_base, mixed_batch(), tmp_path, {"train": train})
    try:
        Trainer(make_plan(recipe, mixed_batch()), hooks=[Look()]).run()
    except KeyboardInterrupt:
        assert ends == "fails"
    assert [step for step in seen if step < 5] == [2, 4] and gc.isenabled()
