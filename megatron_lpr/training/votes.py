"""What ranks tell each other once a step, in the step's one all-reduce of metrics: no further collective, no wait.

    trainer.votes.say("stop")  # on one rank or on several, from any thread, before the step is reduced
    if trainer.votes.count("stop"):  # after the step: how many ranks have said it
        ...

Every rank counts the same.
"""

import queue
from typing import Literal, get_args

import torch
import torch.distributed as dist

from megatron_lpr.platform import device

Kind = Literal[
    "stop",  # end at this step: a signal, or the time is over
    "save",  # write a checkpoint at this step
    "written",  # this rank's part of a checkpoint is on the disk
    "failed",  # it could not be written
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Votes:
    """What this rank will have said at the next step, and how many have said what at the last."""

    def __init__(self) -> None:
        # other threads, and signal handlers, may put
        self._said: dict[Kind, queue.SimpleQueue[None]] = {kind: queue.SimpleQueue() for kind in KINDS}
        self._counts = dict.fromkeys(KINDS, 0)

    def say(self, kind: Kind) -> None:
        """Once for this rank at the next step, however often it is called before that."""
        self._said[kind].put(None)

    def count(self, kind: Kind) -> int:
        """How many ranks had said it when the last step was reduced, or to `count_now` since."""
        return self._counts[kind]

    def fill(self, zeros: torch.Tensor) -> None:
        """Put what this rank says into its place in what is reduced, of a double for each kind; it is said then."""
        for place, kind in enumerate(KINDS):
            if self._take(kind):
                zeros[place].fill_(1)

    def settle(self, sums: torch.Tensor) -> None:
        """Take over the reduced sums, which lie on the host."""
        self._counts = {kind: round(count) for kind, count in zip(KINDS, sums.tolist(), strict=True)}

    def count_now(self, kind: Kind) -> int:
        """How many ranks have said it since the last step; a collective of its own, for what took long after a step."""
        said = torch.full((1,), float(self._take(kind)), dtype=torch.float64, device=device())
        dist.all_reduce(said)
        count = round(float(said))
        self._counts[kind] += count
        return count

    def _take(self, kind: Kind) -> bool:
        said = self._said[kind]
        return bool([said.get_nowait() for _ in range(said.qsize())])
