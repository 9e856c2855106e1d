"""The MoE layer: a router over all experts, frozen experts in place, new experts through Megatron's dispatcher.

Shapes: S positions of this rank, B sequences, T = S*B, H hidden, E experts: J frozen, N new ones.
"""

from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from megatron_lpr.model.dispatchers import DISPATCHERS
from megatron_lpr.model.frozen_expert import DuplicatedLinear, FrozenExpert, add_frozen_experts
from megatron_lpr.model.passengers import tags_of_layer
from megatron_lpr.model.transformer_config import LPRTransformerConfig
from megatron_lpr.platform.side_stream import Beside, InTurn
from megatron_lpr.platform.to_host import ToHost


class LPRMoELayer(MoELayer):
    """Megatron's MoELayer over the new experts, plus the frozen ones; the router gets the language tags."""

    def __init__(
        self,
        config: LPRTransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection=None,
        frozen_linear=DuplicatedLinear,
        **kwargs,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        self.token_dispatcher = DISPATCHERS[config.moe_token_dispatcher_type](
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )
        for parameter in self.experts.parameters():
            # Their gradients are summed over the expert-data-parallel group. Megatron-Core says so only where the
            # expert-parallel size is above 1; with tensor parallelism outside and not inside the experts, each rank
            # would keep the gradient of its own tokens (0.16), and checkpoints would hold one optimizer or two.
            parameter.allreduce = False
        self.frozen_experts = torch.nn.ModuleList(
            FrozenExpert(config, frozen_linear) for _ in range(config.num_frozen_experts)
        )

    def forward(self, hidden_states: Tensor, intermediate_tensors=None, **arguments) -> tuple[Tensor, None]:
        """[S, B, H] -> ([S, B, H], no bias)."""
        assert intermediate_tensors is None, "partial CUDA graphs of the MoE layer are not supported"
        tags_SB = tags_of_layer(arguments, len(hidden_states), self.attn_tp_group)
        if self.moe_layer_recompute and self.training:
            return self._recomputed(hidden_states, tags_SB), None
        return self._forward(hidden_states, tags_SB), None

    def _recomputed(self, hidden_states: Tensor, tags_SB: Tensor | None) -> Tensor:
        if not self.config.fp8:
            return tensor_parallel.checkpoint(self._forward, False, hidden_states, tags_SB)
        # it computes again as it did before: Megatron's own would leave the FP8 context out, and say nothing
        from megatron.core.extensions.transformer_engine import te_checkpoint

        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return te_checkpoint(self._forward, False, tracker, self.attn_tp_group, hidden_states, tags_SB)

    def _forward(self, hidden_states: Tensor, tags_SB: Tensor | None) -> Tensor:
        probs_TE, chosen_TE = self.route(hidden_states, tags_SB)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        # of one split the gradients are laid side by side, of two slices each is padded with zeros and both are added
        sizes = [len(self.frozen_experts), self.config.num_moe_experts]
        (probs_TJ, probs_TN), (chosen_TJ, chosen_TN) = probs_TE.split(sizes, dim=1), chosen_TE.split(sizes, dim=1)
        counts = ToHost(chosen_TJ.sum(0))
        schedule = Beside if self.config.overlap_frozen else InTurn
        frozen_work = schedule(x_TH, probs_TJ, chosen_TJ)
        dispatched, probs = self.preprocess(self._travelling(hidden_states), probs_TN, chosen_TN)
        dispatched, probs = self.dispatch(dispatched, probs)
        # Beside the main stream the frozen experts begin now, while tokens travel; in turn they are computed last.
        # Their counts are read when the dispatcher has waited for the device (that of all-gathers is about to).
        frozen_work.start(partial(add_frozen_experts, self.frozen_experts, counts))
        routed, _ = self.routed_experts_compute(dispatched, probs)
        routed = self.postprocess(self.combine(routed), None)
        return routed + frozen_work.output().view_as(routed)

    def _travelling(self, hidden_states: Tensor) -> Tensor:
        """The hidden states as the dispatcher gets them: in the first layer of a frozen model they need no gradient.

        Transformer Engine's permutation then gives none to the probabilities that travel with them either, and this
        layer's router would learn nothing of the next tokens.
        """
        if not self.config.moe_permute_fusion or hidden_states.requires_grad or not torch.is_grad_enabled():
            return hidden_states
        return hidden_states.detach().requires_grad_()
