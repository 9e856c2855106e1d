"""The losses of MoE-LPR (arXiv 2408.11396) and their normalisation, in one place.

    L = L_NTP + alpha * mean_over_layers(L_balance)                                       stage 1
    L = L_NTP + gamma * mean_over_layers(mean over original tokens of -log p_frozen)      stage 2

Every mean is taken over the **global batch**, whose counts are known before the step (the sampler is arithmetic), so
each rank divides its own sum by the global count and gradients are summed, never averaged, over ranks. That is the
same number for every tensor-, sequence-, pipeline-, context-, expert-, data-parallel and micro-batch split.

Shapes: T tokens of this rank, S positions of this rank, B sequences, E experts (frozen ones first), k = top-k.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True)
class GlobalCounts:
    """Denominators of the current step, the same on every rank; the trainer sets them before the forward pass.

    They are constant over a whole step, so that recomputation and pipelining cannot see another step's values.
    """

    tokens: float = 1.0  # positions with a label
    original_tokens: float = 1.0  # those of original languages
    balance_groups: float = 1.0  # sequences (or micro-batches) of the balance loss
    num_languages: int = 0  # of the whole run: how many sums of token losses there are


def next_token_loss(token_loss_BS: Tensor, loss_mask_BS: Tensor, counts: GlobalCounts) -> Tensor:
    """This rank's share of L_NTP: sum of the token losses (fp32) over the labelled positions / global tokens."""
    return (token_loss_BS.float() * loss_mask_BS).sum() / counts.tokens


def token_loss_sums(token_loss_BS: Tensor, tags_BS: Tensor, num_languages: int) -> Tensor:
    """Sum of the token losses of each language, [L] in fp64; a position counts for the language of its tag, which is 0
    where there is no label."""
    is_language_TL = one_hot_languages(tags_BS, num_languages)
    return torch.where(is_language_TL, token_loss_BS.reshape(-1, 1), 0.0).sum(0, dtype=torch.float64)


def one_hot_languages(tags: Tensor, num_languages: int) -> Tensor:
    """Tags (0 padding, else +-(index + 1)) of any shape to bool [T, L].

    Sums over products with it rather than index_add, whose order of additions on a GPU is not repeatable.
    """
    return tags.reshape(-1, 1).abs() == torch.arange(1, num_languages + 1, device=tags.device)


def lpr_token_loss(logits_TE: Tensor, num_frozen: int, double_softmax: bool = False) -> Tensor:
    """-log of the probability of the frozen experts, from the router's logits in fp32. Returns [T].

    -log sum_{i < num_frozen} p_i = -logsumexp of the frozen experts' log p_i, exact for large losses too.
    `double_softmax` is the published code's loss instead: a cross-entropy (which applies log-softmax) on the
    already softmaxed p. With E experts it cannot fall below log(e + E - 1) - 1.
    """
    logits_TE = logits_TE.float()
    if double_softmax:
        logits_TE = logits_TE.softmax(-1)
    log_p_TJ = logits_TE.log_softmax(-1)[:, :num_frozen]  # one kernel, where a logsumexp takes eight
    return -log_p_TJ[:, 0] if num_frozen == 1 else -log_p_TJ.logsumexp(-1)


def lpr_loss(token_loss_T: Tensor, tags_T: Tensor, counts: GlobalCounts) -> Tensor:
    """This rank's share of one layer's L_LPR: sum over original-language tokens (tag > 0) / their global number."""
    return torch.where(tags_T > 0, token_loss_T, 0.0).sum() / counts.original_tokens


def balance_loss(
    probs_SBE: Tensor,
    chosen_SBE: Tensor,
    valid_SB: Tensor,
    counts: GlobalCounts,
    all_reduce: Callable[[Tensor], None],
    per_sequence: bool = True,
) -> Tensor:
    """This rank's share of one layer's L_balance = mean over groups of E * sum_i f_i * P_i.

    f_i is the share of the group's k*T routing slots that go to expert i, P_i the mean of p_i over its T valid
    tokens; a perfectly balanced router has the floor 1. A group is one sequence (the default: no batch split
    changes the loss), or all sequences of the micro-batch.

    Args:
        probs_SBE: softmax over all experts, fp32, with gradient.
        chosen_SBE: bool, the top-k of each token.
        valid_SB: bool, False for padding, which takes no part.
        all_reduce: sums a tensor in place over the ranks that hold other positions of the same sequences.
    """
    num_experts = probs_SBE.shape[-1]
    slots_BE = (chosen_SBE & valid_SB[..., None]).sum(0, dtype=torch.float32)
    probs_BE = (probs_SBE * valid_SB[..., None]).sum(0)
    shared_BE1 = torch.cat([slots_BE, valid_SB.sum(0, dtype=torch.float32)[:, None]], dim=1)
    if not per_sequence:
        shared_BE1, probs_BE = shared_BE1.sum(0, keepdim=True), probs_BE.sum(0, keepdim=True)
    all_reduce(shared_BE1)
    slots_BE, tokens_B1 = shared_BE1[:, :-1], shared_BE1[:, -1:].clamp(min=1)
    f_BE = slots_BE / slots_BE.sum(1, keepdim=True).clamp(min=1)
    return num_experts * (f_BE * probs_BE / tokens_B1).sum() / counts.balance_groups
