"""What is not finite on one rank is told, and skipped, alike on all of them."""

import contextlib
import json
import math

import torch
from harness import make_plan, make_recipe, mixed_batch, unwrapped

from megatron_lpr.errors import UserError

ROUTER = "decoder.layers.0.mlp.router.weight"  # in its stage


def spoilt_on_the_last_stage(base, folder) -> list[str]:
    from megatron_lpr.platform import megatron

    sections = {"train": {"trainable": "routers", "micro_batch_size": 1}, "parallel": {"pipeline": 2}}
    with megatron() as ranks:
        from megatron_lpr.training.not_finite import check_weights
        from megatron_lpr.training.train import Trainer

        trainer = Trainer(make_plan(make_recipe(base, mixed_batch(), folder, sections), mixed_batch(), world_size=2))
        for chunk in trainer.chunks:
            chunk.train()
        if ranks.rank == 1:
            with torch.no_grad():
                dict(unwrapped(trainer).named_parameters())[ROUTER][0, 0] = torch.inf
        sentences = []
        for look in (lambda: check_weights(trainer.chunks, "here"), trainer.finite_step):
            try:
                look()
            except UserError as error:
                sentences.append(str(error))
        return sentences


def test_named_alike_on_all_ranks(on_ranks, toy_base, tmp_path):
    first, second = on_ranks(spoilt_on_the_last_stage, 2, toy_base, tmp_path)
    assert first == second and len(first) == 2
    name = "the trained weight decoder.layers.1.mlp.router.weight (rank 1) is not finite"
    assert first[0].startswith(f"here: {name}") and f"step 1: the gradient norm is nan: {name} any more" in first[1]


LAYOUTS = {
    "data": {},
    "overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "whole_optimizer": {"distributed_optimizer": False},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "pipeline, interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "expert": {"expert": 2},
    "context": {"context": 2},
}


def skipped_steps(base, base_of_four, folder) -> dict[str, list]:
    """In each layout: a good step, one with a bad loss, one with a bad gradient, a good one; what each rank tells."""
    from megatron_lpr.platform import leave_layout, megatron

    told = {}
    with megatron() as ranks:
        from megatron_lpr.training import fault, step
        from megatron_lpr.training.train import Trainer

        asked, real = [], step.next_token_loss
        fault.documents_of = lambda manifest, data, seed, samples: asked.append(list(samples)) or []
        for name, parallel in LAYOUTS.items():
            sections = {
                "parallel": parallel,
                "model": {"num_experts": 5},
                "optimizer": {"clip_grad": 1.0},
                "train": {"on_not_finite": "skip", "micro_batch_size": 1, "trainable": "new_experts_and_routers"},
            }
            model = base_of_four if "interleaved" in name else base
            recipe = make_recipe(model, mixed_batch(), folder / name, sections)
            trainer = Trainer(make_plan(recipe, mixed_batch(), world_size=2))
            for chunk in trainer.chunks:
                chunk.train()

            def bad_loss(*arguments, trainer=trainer):
                is_bad = trainer.step == 1 and ranks.rank == 1
                return real(*arguments) * (math.nan if is_bad else 1.0)

            step.next_token_loss = bad_loss
            asked.clear()
            records = [trainer.finite_step(), trainer.finite_step()]
            hook = None
            if ranks.rank == 1:
                weight = dict(unwrapped(trainer).named_parameters())[ROUTER]
                hook = weight.register_hook(lambda gradient: gradient * math.inf)
            records.append(trainer.finite_step())
            if hook:
                hook.remove()
            records.append(trainer.finite_step())
            keep = ("step", "skipped", "skipped_steps", "ntp_loss", "grad_norm")
            told[name] = [json.dumps({key: r[key] for key in keep if key in r}) for r in records], list(asked)
            with contextlib.suppress(NameError):
                del weight
            del trainer, hook, bad_loss
            step.next_token_loss = real
            leave_layout()
    return told


def test_steps_are_skipped_alike_in_every_layout(on_ranks, toy_base, tmp_path):
    from megatron_lpr.testing.toy_models import write_toy_model

    base_of_four = write_toy_model(tmp_path / "four", num_hidden_layers=4)
    first, second = on_ranks(skipped_steps, 2, toy_base, base_of_four, tmp_path)
    assert first == second
    for layout, (lines, asked) in first.items():
        good, bad_loss, bad_gradient, last = map(json.loads, lines)
        assert bad_loss["skipped"].startswith("the loss of rank 1 ("), layout
        name = f"decoder.layers.{int('pipeline' in layout)}.mlp.router.weight"
        assert bad_gradient["skipped"].startswith(f"the gradient of {name} on rank 1 ("), layout
        assert "skipped" not in good and "skipped" not in last, layout
        assert last["skipped_steps"] == 2 and math.isfinite(last["ntp_loss"]), layout
        alone = layout in ("data", "overlap", "whole_optimizer", "expert")
        samples = [[5, 7], [9, 11]] if alone else [[4, 5, 6, 7], [8, 9, 10, 11]]
        assert asked == samples, layout
