"""Frozen weights of which each rank holds its rows in FP8: gathered as bytes, and the same numbers as with copies."""

import dataclasses

import pytest
import te_on_cpu
import torch
from harness import make_plan
from layouts import recipe_of, trainer_of, unfair_batch
from te_on_cpu import called

from megatron_lpr.checkpoint.source import source_identity
from megatron_lpr.errors import UserError
from megatron_lpr.planning.planned import planned
from megatron_lpr.testing.equal_runs import checkpoint_tensors
from megatron_lpr.testing.toy_models import write_toy_model

NUMBERS = ("ntp_loss", "balance_loss", "lpr_loss", "grad_norm")
STAGES = ("stage1", "stage2")
# weights that are gathered in the backward passes of four micro-batches: of two layers with two linear modules in the
# attention and two in the frozen expert those of the upper one, in stage 2 also eight in the new experts of either
TRANSPOSED = {"stage1": 4 * 4, "stage2": 4 * 20}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("toy") / "base", hidden_size=64, intermediate_size=96)


def trainer_on(base, folder, stage, frozen, *, held_in="fp8", recompute="none", source=None, resume=None):
    """On two ranks; of stage 2 on the checkpoint `source` of stage 1."""
    from megatron_lpr.training.train import Trainer

    changes = {
        "model": {"spec": "te", "dtype": "bfloat16"} | ({"load": str(source)} if source else {}),
        "train": {"micro_batch_size": 1, "recompute": recompute},
        "fp8": {"recipe": "tensorwise", "frozen_weights": held_in},
        "parallel": {"frozen": frozen},
    }
    if not source:
        return trainer_of(base, stage, folder, changes, resume=resume, world_size=2)
    recipe = recipe_of(base, stage, folder, changes)
    plan = make_plan(recipe, unfair_batch(), source=source, world_size=2)
    trainer = Trainer(dataclasses.replace(plan, origin=source_identity(source)))
    for chunk in trainer.chunks:
        chunk.train()
    return trainer


def numbers_of(metrics) -> list[float]:
    return [metrics[name] for name in NUMBERS]


def rows_in_fp8(trainer) -> list:
    """This rank's, of all weights that are held as rows in FP8."""
    from megatron_lpr.model.fp8_rows import Fp8Rows
    from megatron_lpr.platform.shards import own_part

    parts = [own_part(p) for chunk in trainer.chunks for p in chunk.parameters() if not p.requires_grad]
    return [part for part in parts if isinstance(part, Fp8Rows)]


def scored(trainer) -> list[float]:
    from megatron_lpr.training.hooks.validation import evaluating

    with evaluating(trainer.chunks) as (model,), torch.no_grad():
        return model(torch.arange(7)[None], torch.arange(7)[None], None).double().sum((0, 1)).tolist()


def counted_step(trainer) -> dict:
    """A step, what was gathered in it, and what a plan says of both."""
    from megatron_lpr.planning.counted_collectives import CountedCollectives
    from megatron_lpr.planning.gathered_weights import GatheredWeights

    with GatheredWeights() as gathered, CountedCollectives(gathered) as collectives:
        numbers = numbers_of(trainer.train_step())
    kind = ("all_gather", "frozen")
    memory, traffic = planned(trainer.recipe, trainer.plan.arch, 2, torch.distributed.get_rank())
    return {
        "numbers": numbers,
        "gathered": (gathered.peak, collectives.traffic[kind]),
        "planned": (memory.gathered, traffic.get(kind)),
        "casts": memory.casts,
    }


def assert_as_planned(gathered, of_plan) -> None:
    """To the byte but for norms, 64 numbers, which Transformer Engine has in the linear layer after them."""
    (peak, moved), (planned_peak, planned_moved) = gathered, of_plan
    assert 0 <= peak - planned_peak <= 2 * 64 * 2
    assert moved.calls == planned_moved.calls
    assert (moved.bytes - planned_moved.bytes) % 64 == 0 and moved.bytes - planned_moved.bytes <= moved.calls * 64


def train(base, folder, frozen, stage, source) -> dict:
    """Three steps with held-out text after the first, a checkpoint after the second, and the third again from there."""
    from megatron_lpr.platform import leave_layout
    from megatron_lpr.platform.shards import own_part

    trainer = trainer_on(base, folder, stage, frozen, source=source)
    te_on_cpu.reset_calls()
    found = {"steps": [numbers_of(trainer.train_step())], "transposed": called().get("fp8_transpose", 0)}
    found |= {"scored": scored(trainer)}
    found["steps"].append(numbers_of(trainer.train_step()))
    saved = trainer.save()
    found |= counted_step(trainer)
    found["steps"].append(found.pop("numbers"))
    rows = rows_in_fp8(trainer)
    found["vocabulary"] = own_part(trainer.chunks[0].module.module.embedding.word_embeddings.weight).nbytes
    found["held"] = sum(part.nbytes + part.get_metadata()["fp8_scale_inv"].nbytes for part in rows)
    found["left"] = sum(part._transposed.untyped_storage().nbytes() for part in rows)
    del trainer, rows
    leave_layout()
    if stage == "stage1":
        trainer = trainer_on(base, folder, stage, frozen, resume=saved)
        found["resumed"] = numbers_of(trainer.train_step())
        del trainer
        leave_layout()
    return found | {"saved": saved}


def train_both_ways(base, folder) -> dict:
    from megatron_lpr.platform import leave_layout, megatron

    found: dict = {}
    with megatron():
        for stage in STAGES:
            for frozen in ("replicated", "sharded"):
                source = found["stage1", "sharded"]["saved"] if stage == "stage2" else None
                found[stage, frozen] = train(base, folder / stage / frozen, frozen, stage, source)
            trainer = trainer_on(base, folder / "bf16", stage, "sharded", held_in="bf16", source=source)
            found[stage, "bf16"] = counted_step(trainer)
            del trainer
            leave_layout()
    return found


@pytest.fixture(scope="module")
def runs(base, on_ranks, tmp_path_factory):
    return on_ranks(train_both_ways, 2, base, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_bits_as_with_copies(runs, stage):
    for found in runs:
        replicated, sharded = found[stage, "replicated"], found[stage, "sharded"]
        for name in ("steps", "scored"):
            assert sharded[name] == replicated[name], name
        if stage == "stage1":
            assert sharded["resumed"] == replicated["resumed"] == replicated["steps"][-1]
    ours, theirs = (checkpoint_tensors(found[stage, how]["saved"].parents[1]) for how in ("sharded", "replicated"))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not any("frozen_experts" in name or "self_attention" in name for name in ours)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_held_and_gathered(runs, stage):
    """Of linear layers a byte of each number, and another of what is transposed, in a backward pass only."""
    for found in runs:
        sharded, bf16 = found[stage, "sharded"], found[stage, "bf16"]
        assert sharded["held"] == sharded["casts"] - bf16["casts"]  # of what learns in both
        for of_run in (sharded, bf16):
            assert_as_planned(of_run["gathered"], of_run["planned"])
        assert sharded["transposed"] == TRANSPOSED[stage] and sharded["left"] == 0
        (_, fewer), (_, more) = sharded["gathered"], bf16["gathered"]
        assert fewer.calls == more.calls
        # embedding forward, output layer forward and backward, in four micro-batches; twice is left of norms
        norms = 2 * fewer.bytes - more.bytes - 4 * 3 * sharded["vocabulary"]
        assert 0 <= norms <= fewer.calls * 64


def train_recomputed(base, folder, recompute) -> list:
    from megatron_lpr.platform import leave_layout, megatron

    found = []
    with megatron():
        for frozen in ("replicated", "sharded"):
            trainer = trainer_on(base, folder / frozen, "stage1", frozen, recompute=recompute)
            found.append([numbers_of(trainer.train_step()) for _ in range(2)])
            of_plan = counted_step(trainer)
            del trainer
            leave_layout()
    return [*found, of_plan["gathered"], of_plan["planned"]]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation(base, on_ranks, tmp_path, recompute):
    for replicated, sharded, gathered, of_plan in on_ranks(train_recomputed, 2, base, tmp_path, recompute):
        assert sharded == replicated
        assert_as_planned(gathered, of_plan)


def damage(base, folder) -> list[str]:
    """What is said of a value, a scale, and a value that is no number any more, each on the second rank."""
    from megatron_lpr.platform import leave_layout, megatron
    from megatron_lpr.training.hooks.frozen_weights import FrozenWeights
    from megatron_lpr.training.not_finite import not_finite_weight

    said = []
    with megatron():
        trainer = trainer_on(base, folder, "stage1", "sharded")
        values, about = rows_in_fp8(trainer)[0], rows_in_fp8(trainer)[0].get_metadata()
        for part, byte in (values[0, :1], 1), (about["fp8_scale_inv"].view(torch.uint8), 1), (values[0, :1], 127):
            hook, before = FrozenWeights(trainer.chunks), part.clone()
            if torch.distributed.get_rank() == 1:
                part[0] = byte if byte == 127 else part[0] ^ byte
            try:
                hook.before_save(trainer)
            except UserError as error:
                said.append(str(error))
            said[-1] += f" / {not_finite_weight(trainer.chunks)}"
            part.copy_(before)
        del trainer, values, about, hook
        leave_layout()
    return said


def test_damage_is_found(base, on_ranks, tmp_path):
    first, second = on_ranks(damage, 2, base, tmp_path)
    assert len(first) == len(second) == 3
    assert all("a frozen weight has changed on rank 1" in said for said in first)
    assert all("the frozen weight decoder.layers.0." in said and "on rank 1" in said for said in second)
    assert [said.endswith("None") for said in second] == [True, True, False]


def cast_uneven(rows) -> list:
    """What two ranks gather of a weight whose rows cannot be divided, beside the cast of the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer
    from transformer_engine_torch import DType

    from megatron_lpr.model.fp8_rows import hold_in_fp8
    from megatron_lpr.platform.shards import mark_group, own_part

    torch.manual_seed(0)
    module = torch.nn.Linear(16, rows, bias=False, dtype=torch.bfloat16)
    module.weight.requires_grad_(False)
    quantizer = Float8CurrentScalingQuantizer(DType.kFloat8E4M3, torch.device("cpu"), columnwise=False)
    whole = quantizer(module.weight.detach())
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module, mesh=mesh)
    mark_group(module.weight, mesh.get_group())
    hold_in_fp8(module.weight, quantizer)
    own = own_part(module.weight)
    found = []
    for _ in range(2):
        module.unshard()
        values, scale = module.weight.get_data_tensors()[0], module.weight.get_metadata()["fp8_scale_inv"]
        found += [torch.equal(values, whole.get_data_tensors()[0]), torch.equal(scale, whole._scale_inv)]
        found.append(not own._transposed.untyped_storage().nbytes())  # there is no backward pass
        module.reshard()
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.parametrize("rows", [17, 1])
def test_rows_that_cannot_be_divided(on_ranks, rows):
    assert on_ranks(cast_uneven, 2, rows) == [[True] * 6] * 2
