"""Token dispatchers for fewer slots than tokens * top-k: slots of frozen experts are not dispatched."""

import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)


class NewExpertsAlltoAllDispatcher(MoEAlltoAllTokenDispatcher):
    """The dropless alltoall dispatcher without its assumption that every token fills k slots."""

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert = super().preprocess(routing_map)
        # the size of the permuted buffer goes to the host with the split sizes, in the dispatcher's own copy
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert


DISPATCHERS = {
    "alltoall": NewExpertsAlltoAllDispatcher,
    "allgather": MoEAllGatherTokenDispatcher,
    "flex": MoEFlexTokenDispatcher,
}
