"""What one router did with each language, summed on the device without synchronisation.

Columns of the sums [L, 3 + E]: tokens, sum of p_frozen, sum of the LPR token loss, routing slots of each expert.
Shapes: T tokens, E experts, L languages.
"""

from functools import partial

import torch
from torch import Tensor

from megatron_lpr.losses import one_hot_languages
from megatron_lpr.platform import device

TOKENS, P_FROZEN, LPR_LOSS, SLOTS = 0, 1, 2, 3


class RouterStats:
    """Sums per language since the last `take`; `balance` and `lpr` sum this rank's shares of these losses."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_languages = 0  # the trainer says how many there are; without it nothing is collected
        self.is_wanted = True  # in this step; the losses' shares are summed in all
        self.sums_LC: Tensor | None = None
        self.balance: Tensor | float = 0.0
        self.lpr: Tensor | float = 0.0

    def add(
        self,
        logits_TE: Tensor,
        chosen_TE: Tensor,
        tags: Tensor,
        token_loss: "partial[Tensor]",
    ) -> None:
        """Add one micro-batch; padding (tag 0) is left out. `token_loss` is `lpr_token_loss` with its settings."""
        if not self.num_languages or not self.is_wanted:
            return
        one_hot_TL = one_hot_languages(tags, self.num_languages)
        losses_T = token_loss(logits_TE)
        num_frozen = token_loss.keywords["num_frozen"]
        p_frozen_T = logits_TE.softmax(-1)[:, :num_frozen].sum(-1)
        columns_TC = torch.cat(
            [torch.stack([torch.ones_like(losses_T), p_frozen_T, losses_T], dim=1), chosen_TE], dim=1
        )
        added_LC = one_hot_TL.to(columns_TC.dtype).t() @ columns_TC
        if self.sums_LC is None:
            self.sums_LC = torch.zeros(added_LC.shape, dtype=torch.float64, device=added_LC.device)
        self.sums_LC += added_LC

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums [L, 3 + E] (fp64), the balance and the LPR loss [] since the last call; starts again from zero."""
        sums_LC = self.sums_LC
        zeros = partial(torch.zeros, dtype=torch.float64, device=device())  # from the host they would be waited for
        if sums_LC is None:
            sums_LC = zeros(self.num_languages, SLOTS + self.num_experts)
        balance, lpr = zeros(()) + self.balance, zeros(()) + self.lpr
        self.sums_LC, self.balance, self.lpr = None, 0.0, 0.0
        return sums_LC, balance, lpr
