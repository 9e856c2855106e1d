"""What one router did with each language, summed on the device without synchronisation.

Columns of the sums [L, 3 + E]: tokens, sum of p_frozen, sum of the LPR token loss, routing slots of each expert.
Shapes: N layers, T tokens, E experts, L languages.
"""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_lpr.losses import one_hot_languages
from megatron_lpr.platform import device

TOKENS, P_FROZEN, LPR_LOSS, SLOTS = 0, 1, 2, 3

Routed = tuple[Tensor, Tensor, Tensor, "partial[Tensor]"]  # logits [T, E], chosen [T, E], tags, token loss


class NotYetSummed:
    """What the routers of a model have seen of a micro-batch.

    It is summed for all layers at once: layer by layer that would be fifteen small kernels in each. Of a router there
    is one micro-batch at most, for the next one has what is here summed.
    """

    def __init__(self) -> None:
        self._routed: dict[RouterStats, Routed] = {}

    def add(self, stats: "RouterStats", routed: Routed) -> None:
        """Keep what a router has seen."""
        if stats in self._routed:
            self.sum_up()
        self._routed[stats] = routed

    def sum_up(self) -> None:
        """Add everything to the sums of its router."""
        of_micro_batch = defaultdict(list)
        for stats, (_, _, tags, _) in self._routed.items():  # pipelines may have begun another one
            of_micro_batch[tags.data_ptr(), tags.shape, tags.stride()].append(stats)
        for layers in of_micro_batch.values():
            added_NLC = _sums([self._routed[stats] for stats in layers], layers[0].num_languages).double()
            if any(stats.summed_LC is None for stats in layers):
                for stats, zeros_LC in zip(layers, torch.zeros_like(added_NLC).unbind(), strict=True):
                    stats.summed_LC = zeros_LC if stats.summed_LC is None else stats.summed_LC
            sums: list[Any] = [stats.summed_LC for stats in layers]
            torch._foreach_add_(sums, list(added_NLC.unbind()))
        self._routed.clear()


def _sums(routed: list[Routed], num_languages: int) -> Tensor:
    """Those of layers that saw the same tags, [N, L, 3 + E]."""
    logits, chosen, (tags, *_), (token_loss, *_) = map(list, zip(*routed, strict=True))
    logits_NTE, chosen_NTE = torch.stack(logits), torch.stack(chosen)
    losses_NT = token_loss(logits_NTE.flatten(0, 1)).view(logits_NTE.shape[:2])
    p_frozen_NT = logits_NTE.softmax(-1)[..., : token_loss.keywords["num_frozen"]].sum(-1)
    columns_NTC = torch.cat(
        [torch.stack([torch.ones_like(losses_NT), p_frozen_NT, losses_NT], dim=-1), chosen_NTE], dim=-1
    )
    one_hot_LT = one_hot_languages(tags, num_languages).to(columns_NTC.dtype).t()
    # a product for each layer, so that its sums do not depend on which layers are summed with it
    return torch.bmm(one_hot_LT.expand(len(routed), -1, -1), columns_NTC)


class RouterStats:
    """Sums per language since the last `take`; `balance` and `lpr` sum this rank's shares of these losses.

    Attributes:
        not_yet: shared by the routers of a model, so that they are summed together.
        summed_LC: what is summed of this one's.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_languages = 0  # the trainer says how many there are; without it nothing is collected
        self.is_wanted = True  # in this step; the losses' shares are summed in all
        self.not_yet = NotYetSummed()
        self.summed_LC: Tensor | None = None
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
        if self.num_languages and self.is_wanted:
            self.not_yet.add(self, (logits_TE, chosen_TE, tags, token_loss))

    @property
    def sums_LC(self) -> Tensor | None:
        """The sums so far, in fp64; None if nothing was added."""
        self.not_yet.sum_up()
        return self.summed_LC

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums [L, 3 + E] (fp64), the balance and the LPR loss [] since the last call; starts again from zero."""
        sums_LC = self.sums_LC
        zeros = partial(torch.zeros, dtype=torch.float64, device=device())  # from the host they would be waited for
        if sums_LC is None:
            sums_LC = zeros(self.num_languages, SLOTS + self.num_experts)
        balance, lpr = zeros(()) + self.balance, zeros(()) + self.lpr
        self.summed_LC, self.balance, self.lpr = None, 0.0, 0.0
        return sums_LC, balance, lpr
