"""A weight that is not finite on one rank is named alike on all of them, by its layer in the whole model."""

import torch
from harness import make_plan, make_recipe, mixed_batch, unwrapped

from megatron_lpr.errors import UserError


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
                dict(unwrapped(trainer).named_parameters())["decoder.layers.0.mlp.router.weight"][0, 0] = torch.inf
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
