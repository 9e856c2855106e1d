"""The flex dispatcher's routing metadata, and what one rank need not do; the dispatchers run in tests/distributed."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from harness import gradients
from layouts import trainer_of, write_source


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


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_tokens_of_one_rank_are_sorted_once(megatron, toy_base, tmp_path, monkeypatch, stage):
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_lpr.model.dispatchers import NewExpertsAlltoAllDispatcher
    from megatron_lpr.platform import leave_layout

    source = write_source(toy_base, tmp_path / "source")
    leave_layout()
    sorted_by, steps = token_dispatcher.sort_chunks_by_idxs, []
    for own in (True, False):
        monkeypatch.setattr(token_dispatcher, "sort_chunks_by_idxs", counter := Mock(side_effect=sorted_by))
        if not own:
            for name in ("dispatch_postprocess", "combine_preprocess"):
                monkeypatch.delattr(NewExpertsAlltoAllDispatcher, name)
        trainer = trainer_of(toy_base, stage, tmp_path / str(own), source=source)
        steps.append((trainer.train_step(), {name: g.clone() for name, g in gradients(trainer).items()}))
        assert counter.called != own
        leave_layout()
    (once, gradients_of_once), (twice, gradients_of_twice) = steps
    assert once["ntp_loss"] == twice["ntp_loss"] and once["grad_norm"] == twice["grad_norm"]
    for name, gradient in gradients_of_twice.items():
        assert torch.equal(gradients_of_once[name], gradient), name
