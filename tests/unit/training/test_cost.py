"""The closed forms against real ones: parameters and checkpoints as they are, operations as PyTorch counts them."""

import math

import pytest
import torch
from harness import EXPANDED, ORIGINAL, make_batch, make_plan, make_recipe
from torch.utils.flop_counter import FlopCounterMode

from megatron_lpr.checkpoint.metadata_file import read_metadata
from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.model.parameters import padded_vocab_size
from megatron_lpr.training.cost import logits_in_chunks, model_size, step_flops

TOKENS = {"qaa": 32, "qab": 32}
STATISTICS_COLUMNS = 3 + 4  # of RouterStats for four experts
# The formula leaves attention scores out; torch counts those of the CPU's kernel from 2.15 on.
NO_SCORES = {
    kernel: lambda *shapes, **more: 0
    for kernel in (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
}

METHODS = {
    "stage1": {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.02}},
    "stage2": {"train": {"trainable": "routers"}, "lpr": {"coeff": 0.1}},
    "moe_full": {"train": {"trainable": "all"}},
    "dense": {"train": {"trainable": "all"}, "model": {"num_experts": 0}},
}


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_computes_what_the_formula_says(method, recompute, in_chunks, megatron, toy_base, tmp_path, monkeypatch):
    from megatron.core import parallel_state

    from megatron_lpr.training.train import Trainer

    if in_chunks:
        for module in ("megatron_lpr.model.output_layer", "megatron_lpr.training.cost"):
            monkeypatch.setattr(f"{module}.CHUNK_BYTES", 1 << 14)
    batch = make_batch([[(EXPANDED, TOKENS["qaa"])], [(ORIGINAL, TOKENS["qab"])]])
    train = METHODS[method]["train"] | {"recompute": recompute}
    recipe = make_recipe(toy_base, batch, tmp_path, METHODS[method] | {"train": train})
    try:
        trainer = Trainer(make_plan(recipe, batch))
        with FlopCounterMode(display=False, custom_mapping=NO_SCORES) as counter:
            metrics = trainer.train_step()
    finally:
        parallel_state.destroy_model_parallel()
    arch, topk = trainer.plan.arch, recipe.model.topk
    frozen_slots = [0] * arch.num_layers
    for language, router in metrics.get("router", {}).items():
        for layer, share in enumerate(router["frozen_share"]):
            frozen_slots[layer] += round(share * TOKENS[language] * topk)
    expected = step_flops(
        arch,
        recipe.model,
        recipe.train.trainable,
        tokens=sum(TOKENS.values()),
        frozen_slots=frozen_slots,
        vocab_size=padded_vocab_size(arch.vocab_size, 1),
        recompute=recompute,
        logits_in_chunks=logits_in_chunks(recipe, arch),
    )
    assert logits_in_chunks(recipe, arch) == in_chunks
    statistics = 2 * 3 * sum(TOKENS.values()) * STATISTICS_COLUMNS * arch.num_layers if recipe.model.num_experts else 0
    counted = counter.get_total_flops() - statistics
    assert counted == expected.executed
    assert metrics["tflops_per_device"] * 1e12 * metrics["seconds"] == pytest.approx(counted)
    if recompute == "none" and not in_chunks:
        assert counted == expected.total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_checkpoints_are_as_large_as_expected(megatron, toy_base, tmp_path, method, sharded, dtype):
    from megatron.core import parallel_state

    from megatron_lpr.training.train import Trainer

    batch = make_batch([[(EXPANDED, 8), (ORIGINAL, 8)]])
    sections = METHODS[method] | {"parallel": {"distributed_optimizer": sharded}}
    sections["model"] = sections.get("model", {}) | {"dtype": dtype}
    recipe = make_recipe(toy_base, batch, tmp_path, sections)
    try:
        trainer = Trainer(make_plan(recipe, batch))
        trainer.train_step()
        sizes = []
        for with_optimizer in (False, True):
            folder = trainer.save(with_optimizer=with_optimizer)
            tensors = [t for t in read_metadata(folder).state_dict_metadata.values() if hasattr(t, "size")]
            sizes.append(sum(math.prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in tensors))
            on_disk = sum(file.stat().st_size for file in folder.iterdir())
            assert sizes[-1] < on_disk < sizes[-1] + 10_000 * sum(len(t.chunks) for t in tensors)  # what describes them
            trainer.step += 1
    finally:
        parallel_state.destroy_model_parallel()
    parameters = [(p.numel(), p.requires_grad) for p in trainer.chunks[0].parameters()]
    expected = model_size(recipe, trainer.plan.arch)
    assert expected.trainable == sum(number for number, learns in parameters if learns)
    assert expected.frozen == sum(number for number, learns in parameters if not learns)
    content = read_run_state(folder).content
    assert content == ("over base" if method.startswith("stage") else "whole")
    assert sizes == [expected.weight_bytes[content], expected.checkpoint_bytes(content)]
