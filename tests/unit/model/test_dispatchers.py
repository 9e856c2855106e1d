"""The flex dispatcher's routing metadata; the other dispatchers run in tests/distributed."""

from types import SimpleNamespace

import torch


def test_flex_sends_no_slot_of_a_frozen_expert(megatron, monkeypatch):
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_lpr.model.dispatchers import send_chosen_slots_only

    monkeypatch.setattr(token_dispatcher, "fused_dispatch", lambda *a: None)  # DeepEP's
    monkeypatch.setattr(token_dispatcher, "set_deepep_num_sms", lambda *a: None)
    config = SimpleNamespace(
        moe_router_dtype="fp32",
        moe_expert_capacity_factor=None,
        moe_permute_fusion=False,
        moe_deepep_num_sms=20,
        moe_flex_dispatcher_num_sms=None,  # its name from Megatron-Core 0.17 on
    )
    manager = token_dispatcher._DeepepManager(
        group=None, num_local_experts=2, router_topk=3, num_experts=2, config=config
    )
    send_chosen_slots_only(manager)
    probs_TE = torch.tensor([[0.0, 0.0], [0.3, 0.0], [0.0, 1.0], [0.4, 0.6]])  # 3, 2, 2 and 1 slots are frozen ones'
    manager.setup_metadata(probs_TE > 0, probs_TE)
    assert [sorted(row) for row in manager.token_indices.tolist()] == [[-1, -1], [-1, 0], [-1, 1], [0, 1]]
