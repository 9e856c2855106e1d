"""A layer launches no more kernels than it did: with small models the host launches slower than a GPU computes.

The bounds leave room for other versions of torch and Megatron-Core: a tenth above what 2.13 and 0.16.1 need.
"""

import pytest
from harness import make_trainer
from operations import Operations

STAGES = {
    "stage1": {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.1}},
    "stage2": {"train": {"trainable": "routers"}, "lpr": {"coeff": 0.1}},
}
LAYERS, MICRO_BATCHES = 2, 2


@pytest.fixture(params=STAGES)
def trainer(request, megatron, toy_base, tmp_path):
    sections = STAGES[request.param] | {"model": {"dtype": "bfloat16"}}
    sections["train"] = sections["train"] | {"micro_batch_size": 4 // MICRO_BATCHES}
    trainer = make_trainer(toy_base, tmp_path, **sections)
    trainer.stage = request.param
    trainer.train_step()  # which allocates the optimizer's state
    return trainer


def test_of_a_step(trainer):
    """Per layer and micro-batch, with the embedding, the loss and the update."""
    with Operations() as seen:
        trainer.train_step()
    each = seen.count / (LAYERS * MICRO_BATCHES)
    assert each < {"stage1": 370, "stage2": 300}[trainer.stage], each


def test_of_router_and_dispatch(trainer):
    """Forward, of one MoE layer without its experts."""
    counted = {"layers": 0, "experts": 0}

    def note(module, part):
        def begin(*_):
            seen.append(Operations())
            seen[-1].__enter__()

        def end(*_):
            seen[-1].__exit__(None, None, None)
            counted[part] += seen.pop().count

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    seen: list[Operations] = []
    for name, module in trainer.chunks[0].named_modules():
        if name.endswith(".mlp") and hasattr(module, "router"):
            note(module, "layers")
        elif name.endswith((".experts", "frozen_experts.0")):
            note(module, "experts")
    trainer.train_step()
    each = (counted["layers"] - counted["experts"]) / (LAYERS * MICRO_BATCHES)
    assert each < {"stage1": 59, "stage2": 49}[trainer.stage], each
