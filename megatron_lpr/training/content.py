"""What the checkpoints of a run hold, and the base that they name, as all ranks agree on it."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lpr.checkpoint.base_files import BaseFiles
from megatron_lpr.checkpoint.holding import CONTENTS, Content
from megatron_lpr.platform import device
from megatron_lpr.training.plan import Plan


class NamedBase:
    """The base model as checkpoints name it: its files too, where the frozen weights are theirs.

    A run that starts from the base hashes them beside the first steps; another one knows them from its checkpoint.
    """

    def __init__(self, plan: Plan) -> None:
        self._identity = plan.base
        self._files: BaseFiles | None = None
        if plan.frozen_is_base and plan.below is None:
            self._files = BaseFiles(plan.recipe.model.base, Path(plan.recipe.output))
        elif plan.frozen_is_base and plan.below is not None:
            self._identity = plan.base | {"files": plan.below.base["files"]}

    def identity(self) -> dict[str, Any]:
        """What run.json says of the base; all ranks call it, and the first time it waits for the digests."""
        if self._files is None:
            return self._identity
        return self._identity | {"files": self._files.digests()}


def agreed_content(plan: Plan, finished: bool) -> Content:
    """What a checkpoint of this moment holds; all ranks call it.

    Routers alone only while the checkpoint in model.load is there, which another run may have dropped: rank 0 looks.
    """
    index = torch.zeros((), dtype=torch.int64, device=device())
    if dist.get_rank() == 0:
        index.fill_(CONTENTS.index(plan.content(finished=finished)))
    dist.broadcast(index, 0)
    return CONTENTS[int(index)]
