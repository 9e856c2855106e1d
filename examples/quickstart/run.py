"""The whole method on one machine: a real model learns Hungarian and keeps what it knew, beside what one would do else.

    python examples/quickstart/run.py [--smoke] [--out runs/quickstart]

Every step is a command that is printed as a user would type it; one whose result is already there is left out or finds
nothing to do, so that an interrupted run goes on where it stopped. `--smoke` cuts the steps to a minimum, to see that
everything runs.
"""

import argparse
import hashlib
import io
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

try:
    from megatron_lpr.errors import UserError
    from megatron_lpr.files.cores import usable_cores
except ModuleNotFoundError as error:
    sys.exit(f"quickstart: {error}; pip install '.[quickstart]' has all that it needs")

HERE = Path(__file__).resolve().parent
RECIPES = Path("examples/quickstart/recipes")
BASE = "runs/quickstart/base"
ARMS = {
    "dense": "dense, all trained",
    "stage1": "stage 1",
    "review_without_lpr": "review without LPR",
    "stage2": "review",
}
"""Recipes that train, in order, and what tables and pictures call their models."""
REPLAYED = "en"
MAX_SHARE = 0.5  # of the frozen expert, with top-2
SMOKE_STAGE1 = ["train.steps=2", "optimizer.warmup_steps=0", "train.global_batch_size=1", "train.micro_batch_size=1"]
SMOKE_STAGE2 = ["train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=1"]
SMOKE = {"dense": SMOKE_STAGE1, "stage1": SMOKE_STAGE1, "review_without_lpr": SMOKE_STAGE2, "stage2": SMOKE_STAGE2}
SMOKE_EVALUATE = ["evaluation.max_bytes=400", "evaluation.window=64"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps: checks the plumbing, learns nothing")
    parser.add_argument("--out", type=Path, help="output folder (default runs/quickstart, or runs/quickstart-smoke)")
    options = parser.parse_args()
    os.chdir(HERE.parent.parent)  # recipes name their files from the top of the project
    # two threads a core gain nothing here, and torch would take every core of a shared machine
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.path.insert(0, str(HERE))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Hungarian, where the locale is not UTF-8
    out = options.out or Path("runs/quickstart-smoke" if options.smoke else "runs/quickstart")
    try:
        Quickstart(out, options.smoke).run()
    except ModuleNotFoundError as error:
        sys.exit(f"quickstart: {error}; pip install '.[quickstart]' has all that it needs")
    except (UserError, OSError) as error:  # as what no download gives, and a folder that cannot be written
        sys.exit(f"quickstart: {error}")
    return 0


class Quickstart:
    """The steps in order; `out` is the folder of everything but the base model."""

    def __init__(self, out: Path, smoke: bool) -> None:
        self.out, self.smoke = out, smoke
        self.start = time.monotonic()

    def run(self) -> None:
        self.refuse_other_runs()
        export = self.out / "export"
        base, *models = results = [self.out / f"{arm}.json" for arm in ("base", *ARMS)]
        self.step("the base model", Path(BASE) / "config.json", get_base)
        self.with_recipe("preprocess", "common")
        self.evaluate("base", base, BASE, "--recipe", RECIPES / "common.yaml")
        for arm, result in zip(ARMS, models, strict=True):
            if arm == "stage1":
                self.with_recipe("upcycle", "upcycle", done=self.out / "upcycled/checkpoints/latest")
            self.with_recipe("train", arm)
            self.evaluate(ARMS[arm], result, self.out / arm)
        self.command("export", self.out / "stage2", export, "--results", *results, done=export / "config.json")
        self.command("verify", export, "--checkpoint", self.out / "stage2")
        pictures = ("--base", base, "--replayed", REPLAYED, "--max-share", MAX_SHARE, "--out", self.out / "plots")
        self.command("plot", self.out / "stage1", self.out / "stage2", *models, *pictures)
        self.step("the same words to base and export", None, lambda: self.generate(export))
        self.report(results)

    def refuse_other_runs(self) -> None:
        """Results are left as they are where they are there: they must be of these recipes and this text."""
        digest, record = self.settings(), self.out / "settings.sha256"
        begun = any((self.out / name).exists() for name in ("base.json", *ARMS))
        there = record.read_text(encoding="utf-8").strip() if record.is_file() else None
        if begun and there != digest:
            sys.exit(
                f"quickstart: {self.out} holds runs of other recipes or other text, which one table cannot compare; "
                "remove all in it but base and downloads, or name another folder with --out"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        record.write_text(digest + "\n", encoding="utf-8")

    def settings(self) -> str:
        """SHA-256 over everything that the numbers come from: recipes, text, and whether it is a smoke test."""
        digest = hashlib.sha256(str(self.smoke).encode())
        recipes = [RECIPES / f"{name}.yaml" for name in ("common", "upcycle", *ARMS)]
        for file in recipes + sorted((HERE / "text").glob("*.gz")):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def generate(self, export: Path) -> None:
        from generate import TOKENS, side_by_side

        models = {"base": BASE, "export": export}
        print(side_by_side(models, tokens=4 if self.smoke else TOKENS), flush=True)

    def with_recipe(self, name: str, recipe: str, done: Path | None = None) -> None:
        overrides = [word for override in self.overrides(recipe) for word in ("--set", override)]
        self.command(name, RECIPES / f"{recipe}.yaml", *overrides, done=done)

    def evaluate(self, name: str, result: Path, *model: str | Path) -> None:
        smoke = [word for override in SMOKE_EVALUATE if self.smoke for word in ("--set", override)]
        self.command("evaluate", *model, "--name", name, "--out", result, *smoke, done=result)

    def command(self, *arguments: str | Path | float, done: Path | None = None) -> None:
        """Run one command of `megatron-lpr`, unless its result `done` is there."""
        from megatron_lpr.cli import main as megatron_lpr

        words = list(map(str, arguments))

        def run() -> None:
            if megatron_lpr(words) != 0:
                sys.exit(f"quickstart: megatron-lpr {words[0]} failed (see above)")

        self.step(shlex.join(["megatron-lpr", *words]), done, run)

    def overrides(self, recipe: str) -> list[str]:
        """Settings that move the run to another folder, and the ones that make it a smoke test."""
        moved = []
        if self.out != Path("runs/quickstart"):
            moved = [f"data.manifest={self.out}/data/manifest.yaml", f"preprocess.output={self.out}/data"]
            own = {"upcycle": "upcycled"}.get(recipe, recipe)
            moved.append(f"output={self.out}/{own}")
            load = {"stage1": "upcycled", "review_without_lpr": "stage1", "stage2": "stage1"}.get(recipe)
            moved += [f"model.load={self.out}/{load}"] if load else []
        return moved + (SMOKE.get(recipe, []) if self.smoke else [])

    def step(self, title: str, done: Path | None, run: Callable[[], None]) -> None:
        elapsed = time.monotonic() - self.start
        clock = f"[{int(elapsed // 60)}:{int(elapsed % 60):02d}]"
        if done is not None and done.exists():
            print(f"\n{clock} {title}\n  already done: {done}", flush=True)
            return
        print(f"\n{clock} {title}", flush=True)
        run()

    def report(self, files: list[Path]) -> None:
        from megatron_lpr.evaluation.gain import gain_table
        from megatron_lpr.evaluation.retention import EvaluationResult

        table = gain_table([EvaluationResult.load(file) for file in files], replayed=[REPLAYED])
        (self.out / "table.md").write_text(table + "\n", encoding="utf-8")
        minutes = (time.monotonic() - self.start) / 60
        print(
            f"\n{table}\n\nfinished in {minutes:.1f} minutes: the table is {self.out / 'table.md'}, the pictures are in"
        )
        print(f"{self.out / 'plots'}, the model is {self.out / 'export'}", flush=True)


def get_base() -> None:
    from get_model import get_model

    get_model(Path(BASE), Path(BASE).parent / "downloads")


if __name__ == "__main__":
    sys.exit(main())
