"""What a checkpoint costs a run: bytes and seconds, whole or of what was learnt; the time that a step loses to a save,
synchronous and asynchronous; and checksums.

    python benchmarks/checkpoint.py [--hidden 384] [--layers 8] [--saves 5] [--disk FOLDER]

One run of one process trains a random model and saves after every eighth step, both ways in turn. What a save costs is
what the eight steps with it take longer than eight steps without one.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import xxhash

from megatron_lpr import Hook, cli, load_recipe
from megatron_lpr.api import plan, session
from megatron_lpr.checkpoint.run_state import checkpoint_folder
from megatron_lpr.files.checksum import ChecksummedFile, file_checksum
from megatron_lpr.testing.toy_models import write_toy_project

PERIOD = 8  # steps from one save to the next
WAYS = ("none", "synchronous", "asynchronous")


class Saves(Hook):
    """Saves in every way in turn; what the steps from one save to the next have taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.blocked: dict[str, list[float]] = {way: [] for way in WAYS}

    def start(self, trainer) -> None:
        self._since, self._way = time.perf_counter(), None

    def after_step(self, trainer, metrics) -> None:
        if trainer.step % PERIOD or trainer.finished:
            return
        trainer.finish_save()  # what is not written by now has cost time too
        now = time.perf_counter()
        if self._way:
            self.seconds[self._way].append(now - self._since)
        self._since, self._way = now, WAYS[trainer.step // PERIOD % len(WAYS)]
        if self._way != "none":
            trainer.save(wait=self._way == "synchronous")
        self.blocked[self._way].append(time.perf_counter() - now)


def lost_to_saves(root: Path, hidden: int, layers: int, saves: int) -> None:
    """Print the table of one run."""
    recipes = write_toy_project(
        root, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, head_dim=hidden // 4
    )
    assert cli.main(["preprocess", str(recipes["stage1"])]) == 0
    steps = (len(WAYS) * saves + 2) * PERIOD
    run, hook = plan(load_recipe(recipes["stage1"], ["model.load=null", f"train.steps={steps}"])), Saves()
    with session(run):
        from megatron_lpr.training.train import Trainer

        print(f"trains {steps} steps ...", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            Trainer(run, [hook]).run()
    folder = checkpoint_folder(run.recipe.output)
    size = sum(path.stat().st_size for path in folder.iterdir())
    without = statistics.median(hook.seconds["none"])
    print(f"\na checkpoint has {size / 1e6:.0f} MB, a step takes {without / PERIOD:.3f} s; medians of {saves}")
    print("| save         | training stands still, s | lost in all, s |")
    print("| ------------ | -----------------------: | -------------: |")
    for way in WAYS[1:]:
        still, lost = statistics.median(hook.blocked[way]), statistics.median(hook.seconds[way]) - without
        print(f"| {way:12} | {still:24.3f} | {lost:14.3f} |")


def what_is_held(root: Path, hidden: int, layers: int, saves: int) -> None:
    """Print bytes and seconds of a save of both stages, whole and of what was learnt; not of a run's last step."""
    recipes = write_toy_project(
        root, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, head_dim=hidden // 4
    )
    assert cli.main(["preprocess", str(recipes["stage1"])]) == 0
    print("\n| checkpoint    |        bytes | seconds, median |\n| ------------- | -----------: | --------------: |")
    for stage in ("stage1", "stage2"):
        for whole in (True, False):
            name = f"{stage} {'whole' if whole else 'learnt'}"
            load = "null" if stage == "stage1" else json.dumps(str(root / "stage1 learnt"))
            settings = [f"output={json.dumps(str(root / name))}", f"model.load={load}", f"checkpoint.whole={whole}"]
            settings += ["train.steps=100", "checkpoint.keep=1", "data.replay.stage1_tokens=1000000000"]
            run, seconds = plan(load_recipe(recipes[stage], settings)), []
            with session(run):
                from megatron_lpr.training.train import Trainer

                trainer = Trainer(run)
                for _ in range(saves):
                    trainer.train_step()
                    start = time.perf_counter()
                    folder = trainer.save()
                    seconds.append(time.perf_counter() - start)
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"| {name:13} | {size:12,} | {statistics.median(seconds):15.2f} |", flush=True)


def checksums(root: Path) -> None:
    """Print what checksums cost."""
    data, times = torch.randint(256, (1 << 28,), dtype=torch.uint8).numpy(), {}

    def plain() -> None:
        with open(root / "plain", "wb") as file:
            file.write(data)

    def summed() -> None:
        with ChecksummedFile(root / "summed") as file:
            file.write(data)

    for name, work in {
        "XXH3 of memory, one thread": lambda: xxhash.xxh3_128(data).hexdigest(),
        "written to the cache of the system": plain,
        "written, summed up and synced": summed,
        "read and compared (verify)": lambda: file_checksum(root / "summed"),
    }.items():
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        times[name] = data.nbytes / min(seconds) / 1e9
    print("\n| one thread                         | GB/s |\n| ---------------------------------- | ---: |")
    for name, rate in times.items():
        print(f"| {name:34} | {rate:4.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384, help="hidden size of the model; divisible by 8")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--saves", type=int, default=5, help="of each kind")
    parser.add_argument("--disk", help="an existing folder on the disk to be measured (default: the temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        what_is_held(Path(folder) / "held", options.hidden, options.layers, options.saves)
        lost_to_saves(Path(folder) / "lost", options.hidden, options.layers, options.saves)
        checksums(Path(folder))


if __name__ == "__main__":
    main()
