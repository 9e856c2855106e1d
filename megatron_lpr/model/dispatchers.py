"""Token dispatchers for fewer slots than tokens * top-k: slots of frozen experts are not dispatched."""

import contextlib
import math
from collections.abc import Iterator

import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)


class NewExpertsAlltoAllDispatcher(MoEAlltoAllTokenDispatcher):
    """The dropless alltoall dispatcher without its assumption that every token fills k slots."""

    num_local_experts: int

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert = super().preprocess(routing_map)
        # the size of the permuted buffer goes to the host with the split sizes, in the dispatcher's own copy
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert

    def dispatch_postprocess(self, *args, **kwargs):
        with self._without_sorting_what_is_sorted():
            return super().dispatch_postprocess(*args, **kwargs)

    def combine_preprocess(self, *args, **kwargs):
        with self._without_sorting_what_is_sorted():
            return super().combine_preprocess(*args, **kwargs)

    @contextlib.contextmanager
    def _without_sorting_what_is_sorted(self) -> Iterator[None]:
        """Tokens of several ranks are sorted by expert once more. Those of one rank are: Megatron would copy them."""
        experts = self.num_local_experts
        if self.tp_size * self.ep_size == 1:
            self.num_local_experts = 1
        try:
            yield
        finally:
            self.num_local_experts = experts


class NewExpertsFlexDispatcher(MoEFlexTokenDispatcher):
    """The flex dispatcher (CUDA, DeepEP), sending the slots of new experts only."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        send_chosen_slots_only(self._comm_manager)


def send_chosen_slots_only(manager) -> None:
    """Have Megatron's DeepEP manager send a token to the experts with a probability above 0, not to the k largest.

    It does so for itself where tokens may be dropped, which a capacity factor says and nothing else reads; and there
    may be fewer new experts than slots.
    """
    manager.capacity_factor = math.inf
    manager.router_topk = min(manager.router_topk, manager.num_experts)


DISPATCHERS = {
    "alltoall": NewExpertsAlltoAllDispatcher,
    "allgather": MoEAllGatherTokenDispatcher,
    "flex": NewExpertsFlexDispatcher,
}
