"""Losses and router records from summed statistics."""

import pytest
import torch
from harness import make_trainer
from manifest_entries import entry, tokenizer_record
from operations import Operations

from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.training.step_metrics import ReducedStats, loss_per_language, lpr_loss, router_record, router_summary

# per layer and language: tokens, sum of p_frozen, sum of the LPR loss, slots of three experts
SUMS = torch.tensor(
    [
        [[4, 1.0, 8.0, 2, 3, 3], [2, 1.5, 1.0, 2, 1, 1], [0, 0, 0, 0, 0, 0]],
        [[4, 2.0, 6.0, 4, 4, 0], [2, 1.0, 3.0, 1, 2, 1], [0, 0, 0, 0, 0, 0]],
    ],
    dtype=torch.float64,
)
STATS = ReducedStats(
    ntp_loss=1.0,
    token_loss_sums_L=torch.tensor([8.0, 3.0, 0.0], dtype=torch.float64),
    sums_NLC=SUMS,
    balance_N=torch.zeros(2),
    lpr_N=torch.zeros(2),
)


def test_lpr_loss_is_the_mean_over_layers_and_original_tokens():
    assert lpr_loss(STATS, [False, True, True]) == pytest.approx((1.0 + 3.0) / 2 / 2)
    assert lpr_loss(STATS, [True, True, False]) == pytest.approx((9.0 + 9.0) / 2 / 6)


def test_loss_per_language_is_the_mean_over_its_tokens():
    assert loss_per_language(STATS, {"hu": 4, "en": 2, "es": 0}) == {"hu": 2.0, "en": 1.5}  # no token of es


def test_lpr_loss_without_original_tokens_is_none():
    assert lpr_loss(STATS, [False, False, True]) is None


@pytest.mark.parametrize("num_frozen, shares", [(1, [0.25, 0.5]), (2, [0.625, 1.0])])
def test_router_record(num_frozen, shares):
    record = router_record(SUMS, ("hu", "en", "es"), num_frozen)
    assert record.keys() == {"hu", "en"}  # no token of es in this step
    assert record["hu"] == {
        "frozen_share": shares,
        "p0": [0.25, 0.5],
        "load": [[0.25, 0.375, 0.375], [0.5, 0.5, 0.0]],
    }


def test_summary_of_the_layers():
    (hu, en) = router_summary(SUMS, ("hu", "en", "es"), 1).values()
    assert hu == {
        "frozen_share": {"mean": 0.375, "min": 0.25, "max": 0.5},
        "p0": {"mean": 0.375, "min": 0.25, "max": 0.5},
        "busiest_expert": {"mean": 1.3125, "min": 1.125, "max": 1.5},  # of three experts 0.375 and 0.5 of the slots
    }
    assert en["p0"] == {"mean": 0.625, "min": 0.5, "max": 0.75}


def test_a_summary_costs_as_many_operations_whatever_the_languages(monkeypatch):
    numbers, tolist = {}, torch.Tensor.tolist
    # by tensor: under a function mode, which a test before this one may have left, each call comes twice
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: numbers.update({self: self.numel()}) or tolist(self))
    counts = []
    for languages in (2, 200):
        sums_NLC = torch.rand(4, languages, 3 + 256, dtype=torch.float64) + 1
        numbers.clear()
        with Operations() as operations:
            router_summary(sums_NLC, tuple(map(str, range(languages))), 1)
        counts.append(operations.count)
        assert sum(numbers.values()) == 10 * languages  # tokens of each, and the nine numbers
    assert counts[0] == counts[1]


def test_a_step_looks_at_no_corpus_to_know_its_languages():
    """There may be thousands, and every step asks more than once."""

    class Watched(tuple):
        passes = 0

        def __iter__(self):
            Watched.passes += 1
            return super().__iter__()

    manifest = Manifest(path="m", tokenizer=tokenizer_record(9), corpora=Watched([entry("hu", tokens=9)]))
    assert manifest.languages == ("hu",)
    passes = Watched.passes
    assert manifest.languages == ("hu",) and manifest.language_roles == {"hu": "expanded"} and Watched.passes == passes


def test_steps_that_log_nothing_of_routers_reduce_nothing_of_them(megatron, toy_base, tmp_path, monkeypatch):
    from megatron_lpr.platform.to_host import ToHost
    from megatron_lpr.training import step_metrics

    reduced = []
    monkeypatch.setattr(step_metrics, "ToHost", lambda packed: reduced.append(packed.numel()) or ToHost(packed))
    trainer = make_trainer(toy_base, tmp_path, logging={"router_every": 2}, train={"steps": 6})
    losses = [trainer.train_step()["lpr_loss"] for _ in range(3)]
    assert losses[0] and losses[1] and losses[2] is None  # it is not trained with, and not measured there
    layers, experts = len(trainer.routers), trainer.recipe.model.num_experts
    of_routers = layers * len(trainer.plan.manifest.languages) * (3 + experts)
    assert [size - min(reduced) for size in reduced] == [of_routers, of_routers, 0]


def test_statistics_are_collected_in_the_steps_that_log_them(megatron, toy_base, tmp_path):
    losses = ("ntp_loss", "balance_loss", "lpr_loss")

    def records(name, **logging):
        from megatron_lpr.platform import leave_layout

        sections = {"logging": logging, "train": {"steps": 6}, "balance": {"coeff": 0.1}, "lpr": {"coeff": 0.1}}
        trainer = make_trainer(toy_base, tmp_path / name, **sections)
        found = [trainer.train_step() for _ in range(5)]
        leave_layout()
        return found

    every, seldom = records("every"), records("seldom", router_every=4, router_layers_every=3)
    for step, (full, sparse) in enumerate(zip(every, seldom, strict=True), start=1):
        assert {name: sparse[name] for name in losses} == pytest.approx({name: full[name] for name in losses}, rel=1e-6)
        assert ("router_summary" in sparse, "router" in sparse) == (step == 4, step in (1, 3))
        assert ("tflops_per_device" in sparse) == (step != 2 and step != 5)
    assert seldom[3]["router_summary"] == every[3]["router_summary"] and seldom[0]["router"] == every[0]["router"]
