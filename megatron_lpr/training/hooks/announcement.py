"""What a start of a run writes and prints before its first step."""

import torch
import torch.distributed as dist
import yaml

from megatron_lpr.checkpoint.same_run import changed_settings
from megatron_lpr.platform import device
from megatron_lpr.platform.shards import own_part
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.reporting.progress import stamped
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer
from megatron_lpr.training.starts import record_start


class Announcement(Hook):
    """Writes the resolved recipe, and prints what a resumed run changes, what was read, and what this rank learns."""

    def start(self, trainer: RunningTrainer) -> None:
        from megatron_lpr.model.fused_kernels import description
        from megatron_lpr.model.grouped_experts import GroupedExperts
        from megatron_lpr.training.optimizer import optimizer_parameters, trainable_parameters

        read = torch.tensor(trainer.bytes_read, device=device())
        dist.all_reduce(read)
        if dist.get_rank() != 0:
            return
        plan, recipe = trainer.plan, trainer.recipe
        path = plan.recipe_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")
        if plan.state:
            print(stamped(f"resumes at step {trainer.step} from {plan.resume}"))
            for change in changed_settings(recipe, plan.state):
                print(f"  changed: {change}")
        if int(read):
            print(
                f"read of the base: {trainer.bytes_read / 1e9:.3g} GB by rank 0, {int(read) / 1e9:.3g} GB by all ranks"
            )
        total = sum(own_part(p).numel() for chunk in trainer.chunks for p in chunk.parameters())
        print(
            f"parameters on rank 0: {total:,}, trainable {trainable_parameters(trainer.chunks):,}, "
            f"in its optimizer {optimizer_parameters(trainer.optimizer):,}",
            flush=True,
        )
        modules = (module for chunk in trainer.chunks for module in chunk.modules())
        if experts := next((module for module in modules if isinstance(module, GroupedExperts)), None):
            print(f"new experts are computed {'at once' if experts.is_grouped else 'one after the other'}", flush=True)
        if torch.cuda.is_available():
            print(description(trainer.chunks), flush=True)


class Starts(Hook):
    """A line of starts.jsonl."""

    def start(self, trainer: RunningTrainer) -> None:
        record_start(trainer.recipe.output, step=trainer.step)
