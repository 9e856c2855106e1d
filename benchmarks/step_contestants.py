"""Who makes the steps that benchmarks/train_step.py times: the trainer, and the plain implementation.

Both make the same steps: same batches, same layers, same freezing; random weights, which take as long as others.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol
from unittest import mock

import torch
from plain_moe import PlainModel
from step_cases import Case, RandomPlan

from megatron_lpr.data.sampler.batches import MicroBatches, RankLayout
from megatron_lpr.model.parameters import padded_vocab_size
from megatron_lpr.platform import device
from megatron_lpr.platform.shards import own_part
from megatron_lpr.training.cost import step_flops


class Contestant(Protocol):
    name: str

    def step(self) -> float:
        """Make a step; returns the operations that it took (matrix products of weights, as cost.py counts them)."""

    def memory(self) -> "Memory": ...


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that are held between the steps; `peak`, most in a step, is known on a GPU only."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    peak: int | None = None


class Ours:
    """The trainer's own step, without the hooks around it."""

    name = "megatron_lpr"

    def __init__(self, case: Case, plan: RandomPlan) -> None:
        from megatron.core import parallel_state

        from megatron_lpr.training import train

        beside_another = parallel_state.model_parallel_is_initialized()
        with mock.patch.object(train, "fill_weights", _random_weights):
            if beside_another:  # the layout of all is the same: one rank
                with mock.patch.object(train, "init_model_parallel"):
                    self.trainer = train.Trainer(plan)
            else:
                self.trainer = train.Trainer(plan)
        for chunk in self.trainer.chunks:
            chunk.train()

    def step(self) -> float:
        metrics = self.trainer.train_step()
        return metrics["tflops_per_device"] * metrics["seconds"] * 1e12

    def memory(self) -> Memory:
        from megatron_lpr.planning.one_step import bytes_of, optimizer_tensors

        parameters = [own_part(parameter) for chunk in self.trainer.chunks for parameter in chunk.parameters()]
        learns = [parameter for parameter in parameters if parameter.requires_grad]
        buffers = [b for chunk in self.trainer.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        return Memory(
            frozen=bytes_of(parameter for parameter in parameters if not parameter.requires_grad),
            trained=bytes_of(learns),
            gradients=bytes_of(buffer.grad_data for buffer in buffers),
            optimizer=bytes_of(optimizer_tensors(self.trainer.optimizer, learns)),
        )


def _random_weights(recipe, arch, chunks, source) -> int:
    """In place of the base's, on the device; nothing is read."""
    torch.manual_seed(0)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            _fill(name, own_part(parameter).detach())
    return 0


def _fill(name: str, values: torch.Tensor) -> None:
    if "norm" in name:
        values.fill_(1.0)
    elif name.endswith("bias"):
        values.zero_()
    else:
        values.normal_(0.0, 0.02)


class Plain:
    """The baseline: see plain_moe.py."""

    name = "plain"

    def __init__(self, case: Case, plan: RandomPlan) -> None:
        self.case, self.plan, recipe = case, plan, plan.recipe
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32 if case.precision == "fp32" else torch.bfloat16)
        try:
            with device():
                self.model = PlainModel(recipe, plan.arch)
        finally:
            torch.set_default_dtype(torch.float32)
        for name, parameter in self.model.named_parameters():
            _fill(name, parameter.detach())
        self.learns = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        settings = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.learns,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        layout = RankLayout(micro_batch_size=case.micro_batch)
        batches = MicroBatches(plan.sampler, layout, consumed_samples=0, read_ahead=plan.data.read_ahead)
        self.batches = batches
        self.ntp_loss = 0.0

    def step(self) -> float:
        micro_batches: Iterator = self.batches.step(self.case.samples)[0]
        count, total = self.case.samples // self.case.micro_batch, torch.zeros((), device=device())
        for batch in micro_batches:
            arrays = batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, batch.tags_BS
            loss, ntp = self.model.loss(*(torch.from_numpy(array).to(device()) for array in arrays))
            (loss / count).backward()
            total += ntp / count
        torch.nn.utils.clip_grad_norm_(self.learns, self.plan.recipe.optimizer.clip_grad, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ntp_loss = float(total)
        return float(self._flops())

    def _flops(self) -> int:
        arch, recipe = self.plan.arch, self.plan.recipe
        assert recipe.train is not None
        slots = [int(block.frozen_slots) for block in self.model.moe_blocks]
        for block in self.model.moe_blocks:
            block.frozen_slots = 0
        return step_flops(
            arch,
            recipe.model,
            recipe.train.trainable,
            tokens=self.case.tokens,
            frozen_slots=slots,
            vocab_size=padded_vocab_size(arch.vocab_size, 1),
        ).total

    def memory(self) -> Memory:
        parameters = list(self.model.parameters())
        trained = sum(parameter.nbytes for parameter in self.learns)
        states = (x for state in self.optimizer.state.values() for x in state.values() if x.dim())
        return Memory(
            frozen=sum(parameter.nbytes for parameter in parameters) - trained,
            trained=trained,
            gradients=trained,  # made anew in every step
            optimizer=sum(x.nbytes for x in states),
        )


def leave() -> None:
    """Give the memory of all contestants back, once nothing refers to them."""
    from megatron.core import parallel_state

    from megatron_lpr.platform import leave_layout

    if parallel_state.model_parallel_is_initialized():
        leave_layout()
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
