"""What ranks tell each other once a step, in the step's one all-reduce of metrics: no further collective, no wait.

    trainer.votes.say("stop")  # on one rank or on several, from any thread, before the step is reduced
    if trainer.votes.count("stop"):  # after the step: how many ranks have said it
        ...

Every rank counts the same.
"""

import queue
from typing import Literal, get_args

import torch

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
        self._said: queue.SimpleQueue[Kind] = queue.SimpleQueue()  # other threads, and signal handlers, may put
        self._counts = dict.fromkeys(KINDS, 0)

    def say(self, kind: Kind) -> None:
        """Once for this rank at the next step, however often it is called before that."""
        assert kind in KINDS, kind
        self._said.put(kind)

    def count(self, kind: Kind) -> int:
        """How many ranks had said it when the last step was reduced."""
        return self._counts[kind]

    def fill(self, zeros: torch.Tensor) -> None:
        """Put what this rank says into its place in what is reduced, of a double for each kind; it is said then."""
        said = {self._said.get_nowait() for _ in range(self._said.qsize())}
        for kind in said:
            zeros[KINDS.index(kind)].fill_(1)

    def settle(self, sums: torch.Tensor) -> None:
        """Take over the reduced sums, which lie on the host."""
        self._counts = {kind: round(count) for kind, count in zip(KINDS, sums.tolist(), strict=True)}
