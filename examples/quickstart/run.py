"""The whole method on one machine: a real model learns Hungarian, and keeps its English and Spanish.

    python examples/quickstart/run.py [--smoke] [--out runs/quickstart]

Every step is a command that is printed as a user would type it; one whose result is already there is left out or finds
nothing to do, so that an interrupted run goes on where it stopped. `--smoke` cuts the steps to a minimum, to see that
everything runs.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECIPES = Path("examples/quickstart/recipes")
SMOKE = {
    "stage1": ["train.steps=2", "optimizer.warmup_steps=0", "train.global_batch_size=1", "train.micro_batch_size=1"],
    "stage2": ["train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=1"],
    "evaluate": ["evaluation.max_bytes=600", "evaluation.window=64"],
}
PROMPTS = {"hu": "A program segítségével", "en": "The Debian operating system", "es": "El sistema operativo"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps: checks the plumbing, learns nothing")
    parser.add_argument("--out", type=Path, help="output folder (default runs/quickstart, or runs/quickstart-smoke)")
    options = parser.parse_args()
    os.chdir(HERE.parent.parent)  # recipes name their files from the top of the project
    # two threads a core gain nothing here, and torch would take every core of a shared machine
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    out = options.out or Path("runs/quickstart-smoke" if options.smoke else "runs/quickstart")
    Quickstart(out, options.smoke).run()
    return 0


class Quickstart:
    """The steps in order; `out` is the folder of everything but the base model."""

    def __init__(self, out: Path, smoke: bool) -> None:
        self.out, self.smoke = out, smoke
        self.start = time.monotonic()

    def run(self) -> None:
        base, final = "runs/quickstart/base", self.out / "export"
        stage1, stage2 = self.out / "stage1", self.out / "stage2"
        results = [self.out / f"{model}.json" for model in ("base", "stage1", "stage2")]
        self.step("the base model", Path(base) / "config.json", lambda: self.get_model(base))
        self.with_recipe("preprocess", "common")
        self.with_recipe("upcycle", "upcycle", done=self.out / "upcycled/checkpoints/latest")
        self.evaluate("base", results[0], base, "--recipe", RECIPES / "common.yaml")
        self.with_recipe("train", "stage1")
        self.evaluate("stage 1", results[1], stage1)
        self.with_recipe("train", "stage2")
        self.evaluate("stage 2", results[2], stage2)
        self.command("export", stage2, final, "--results", *results, done=final / "config.json")
        self.command("verify", final, "--checkpoint", stage2)
        self.command("plot", stage1, stage2, *results[1:], "--max-share", 0.5, "--out", self.out / "plots")
        self.step("text from the export", None, lambda: generate(str(final), self.smoke))
        self.report(results)

    def get_model(self, folder: str) -> None:
        sys.path.insert(0, str(HERE))
        from get_model import get_model

        get_model(Path(folder), Path(folder).parent / "downloads")

    def with_recipe(self, name: str, recipe: str, done: Path | None = None) -> None:
        overrides = [word for override in self.overrides(recipe) for word in ("--set", override)]
        self.command(name, RECIPES / f"{recipe}.yaml", *overrides, done=done)

    def evaluate(self, name: str, result: Path, *model: str | Path) -> None:
        smoke = [word for override in SMOKE["evaluate"] if self.smoke for word in ("--set", override)]
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
            load = {"stage1": "upcycled", "stage2": "stage1"}.get(recipe)
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
        from megatron_lpr.evaluation.retention import EvaluationResult, retention_table

        table = retention_table([EvaluationResult.load(file) for file in files])
        (self.out / "table.md").write_text(table + "\n", encoding="utf-8")
        minutes = (time.monotonic() - self.start) / 60
        print(f"\n{table}\n\nfinished in {minutes:.1f} minutes; the model is in {self.out / 'export'}", flush=True)


def generate(folder: str, smoke: bool) -> None:
    """A few words in each language, from the export under stock transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for language, prompt in PROMPTS.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=4 if smoke else 24, do_sample=False, repetition_penalty=1.3)
        print(f"  {language}: {' '.join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())}")


if __name__ == "__main__":
    sys.exit(main())
