"""Settings of a loss whose coefficient is 0 are told, not refused: stages share files."""

import pytest

from megatron_lpr.recipe.checks import losses_left_out
from megatron_lpr.recipe.settings import BalanceConfig, LPRConfig, ModelConfig, Recipe

GROUP = "balance.group: micro_batch has no effect while balance.coeff is 0"
LOSS = "lpr.loss: double_softmax has no effect while lpr.coeff is 0"


@pytest.mark.parametrize("coeff, told", [(0.0, [GROUP, LOSS]), (0.1, [])])
def test_settings_of_a_loss_that_is_left_out(coeff, told):
    recipe = Recipe(
        name="x",
        output="o",
        model=ModelConfig(base="b"),
        balance=BalanceConfig(coeff=coeff, group="micro_batch"),
        lpr=LPRConfig(coeff=coeff, loss="double_softmax"),
    )
    assert list(losses_left_out(recipe)) == told
    assert not list(losses_left_out(Recipe(name="x", output="o", model=ModelConfig(base="b"))))
