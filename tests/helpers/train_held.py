"""`megatron-lpr train`, held before a step for a test that is not to come too late, however busy the machine is.

    train_held.py STEP FILE RECIPE [...]

The step after STEP waits until FILE is there, or until the run is asked to stop; where STEP is -1, the start-up.
"""

import sys
import time
from pathlib import Path

from megatron_lpr.cli import main
from megatron_lpr.platform import prepare
from megatron_lpr.signals import listener


def hold(step: int, file: Path) -> None:
    prepare()
    from megatron_lpr.training.hooks.stopping import Stopping
    from megatron_lpr.training.train import Trainer

    train_step, start = Trainer.train_step, Stopping.start

    def wait():
        while not file.exists() and not listener().asked:
            time.sleep(0.01)

    def held(trainer):
        if trainer.step == step:
            wait()
        return train_step(trainer)

    def held_start(stopping, trainer):
        if step == -1:
            wait()
        start(stopping, trainer)

    Trainer.train_step, Stopping.start = held, held_start


if __name__ == "__main__":
    hold(int(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(main(["train", *sys.argv[3:]]))
