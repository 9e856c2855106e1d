"""The closed form against PyTorch's counter: nothing is computed that no trainable parameter needs."""

import pytest
from harness import EXPANDED, ORIGINAL, make_batch, make_plan, make_recipe
from torch.utils.flop_counter import FlopCounterMode

from megatron_lpr.model.vocabulary import padded_vocab_size
from megatron_lpr.training.flops import step_flops

TOKENS = {"qaa": 32, "qab": 32}
STATISTICS_COLUMNS = 3 + 4  # of RouterStats for four experts

METHODS = {
    "stage1": {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.02}},
    "stage2": {"train": {"trainable": "routers"}, "lpr": {"coeff": 0.1}},
    "moe_full": {"train": {"trainable": "all"}},
    "dense": {"train": {"trainable": "all"}, "model": {"num_experts": 0}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_computes_what_the_formula_says(method, megatron, toy_base, tmp_path):
    from megatron.core import parallel_state

    from megatron_lpr.training.train import Trainer

    batch = make_batch([[(EXPANDED, TOKENS["qaa"])], [(ORIGINAL, TOKENS["qab"])]])
    recipe = make_recipe(toy_base, batch, tmp_path, METHODS[method])
    try:
        trainer = Trainer(make_plan(recipe, batch))
        with FlopCounterMode(display=False) as counter:
            metrics = trainer.train_step()
    finally:
        parallel_state.destroy_model_parallel()
    arch, topk = trainer.plan.arch, recipe.model.topk
    frozen_slots = [0] * arch.num_layers
    for language, router in metrics.get("router", {}).items():
        for layer, share in enumerate(router["frozen_share"]):
            frozen_slots[layer] += round(share * TOKENS[language] * topk)
    expected = step_flops(
        arch,
        recipe.model,
        recipe.train.trainable,
        tokens=sum(TOKENS.values()),
        frozen_slots=frozen_slots,
        vocab_size=padded_vocab_size(arch.vocab_size, 1),
    )
    statistics = 2 * 3 * sum(TOKENS.values()) * STATISTICS_COLUMNS * arch.num_layers if recipe.model.num_experts else 0
    # torch has no formula for the CPU's attention kernel, so that both counts leave attention scores out
    assert counter.get_total_flops() - statistics == expected.total
