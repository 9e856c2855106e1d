"""What a start of a run writes and prints before its first step."""

import torch.distributed as dist
import yaml

from megatron_lpr.checkpoint.same_run import changed_settings
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.reporting.progress import stamped
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer
from megatron_lpr.training.starts import record_start


class Announcement(Hook):
    """Writes the resolved recipe, and prints what a resumed run changes and how much this rank learns."""

    def start(self, trainer: RunningTrainer) -> None:
        from megatron_lpr.training.optimizer import optimizer_parameters, trainable_parameters

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
        total = sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters())
        print(
            f"parameters on rank 0: {total:,}, trainable {trainable_parameters(trainer.chunks):,}, "
            f"in its optimizer {optimizer_parameters(trainer.optimizer):,}",
            flush=True,
        )


class Starts(Hook):
    """A line of starts.jsonl."""

    def start(self, trainer: RunningTrainer) -> None:
        record_start(trainer.recipe.output, step=trainer.step)
