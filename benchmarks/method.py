"""The method beside what users would do instead: new languages learnt, and old ones kept, for the same tokens.

    python benchmarks/method_text.py                                # once: the text, from Debian's packages
    python benchmarks/method.py --dtype bfloat16 --jobs 8           # on a GPU; on a CPU: hours, one job at a time
    python benchmarks/method.py --groups gamma review               # and what a setting of the review changes
    python benchmarks/method.py --smoke --base TOY --out FOLDER     # a few tiny steps: checks the plumbing

Arms: the base; dense, all trained; LoRA (peft); upcycled, all trained; stage 1; review without the LPR loss, with the
published code's, and as it is. Each is a process of its own; what is finished is not made again, so that an interrupted
benchmark goes on where it stopped. Settings are chosen on validation text, the table is of other documents
(method_text.py).
Writes <out>/results.json and tables.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from method_arms import GROUPS, Arm, Settings, arms, common
from method_lora import train_lora
from method_tables import tables
from train_step import surroundings

from megatron_lpr import Hook, api
from megatron_lpr.cli import main as megatron_lpr
from megatron_lpr.errors import UserError
from megatron_lpr.platform import device
from megatron_lpr.recipe.reading import load_recipe
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.training.cost import model_size

ROOT = Path(__file__).resolve().parents[1]
SMOKE = {"tokens": 64, "seq_length": 32, "batch": 1, "micro_batch": 1, "window": 32, "max_bytes": 300, "lora_rank": 2}
# of the fields of Settings, in their order
FLAGS = (
    *("--base", "--text", "--dtype", "--tokens", "--review", "--replay", "--seq-length", "--batch", "--micro-batch"),
    *("--experts", "--topk", "--lr", "--dense-lr", "--full-lr", "--lora-lr", "--lora-rank", "--router-lr", "--gamma"),
    *("--window", "--max-bytes"),
)


class Cost(Hook):
    """What the steps of an arm came to."""

    def __init__(self) -> None:
        self.found = {"seconds": 0.0, "tokens": 0.0, "flops": 0.0}

    def after_step(self, trainer, metrics) -> None:
        self.found["seconds"] += metrics["seconds"]
        self.found["tokens"] += metrics["tokens"]
        self.found["flops"] += metrics.get("tflops_per_device", 0.0) * 1e12 * metrics["seconds"]


def recipe_of(arm: Arm, settings: Settings, out: Path) -> Recipe:
    """Written beside the run, so that a user can start it again by hand."""
    folder = out / arm.folder
    tree = common(settings, out)
    for section, values in arm.tree.items():
        tree[section] = tree.get(section, {}) | values
    tree |= {"name": arm.name, "output": str(folder / "run")}
    if arm.after:
        tree["model"]["load"] = str(out / Arm(name=arm.after).folder / "run")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    return load_recipe(folder / "recipe.yaml")


def peak_of_process() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(arm: Arm, settings: Settings, out: Path) -> None:
    """Train and score one arm, in this process."""
    recipe, folder = recipe_of(arm, settings, out), out / arm.folder
    cost: dict[str, float] = {}
    model: Path | str = folder / "run"
    if arm.way == "none":
        model = settings.base
    elif arm.way == "lora":
        model = folder / "merged"
        cost = train_lora(recipe, settings.lora_rank, model)
    else:
        hook, plan = Cost(), api.plan(recipe)
        api.train(plan, [hook])
        trained = model_size(recipe, plan.arch).trainable
        width = getattr(torch, recipe.model.dtype).itemsize
        if not plan.finished:
            cost = hook.found | {"trained_parameters": trained, "trained_bytes": trained * width}
    if cost or arm.way == "none":
        on_gpu = device().type == "cuda"
        peak = torch.cuda.max_memory_allocated if on_gpu else peak_of_process
        (folder / "cost.json").write_text(json.dumps(cost and cost | {"peak_bytes": peak()}))
    result = api.evaluate(model, recipe=recipe, name=arm.name)
    (folder / "environment.json").write_text(json.dumps(surroundings("transformers", "peft")))
    result.save(folder / "result.json")  # the last thing: an arm that has it is finished


def run_all(wanted: dict[str, Arm], out: Path, jobs: int, command: Sequence[str]) -> list[str]:
    """Each unfinished arm in a process of its own, `jobs` at a time, after what it starts from; returns what failed."""
    waiting = {name: arm for name, arm in wanted.items() if not (out / arm.folder / "result.json").exists()}
    running: dict[str, subprocess.Popen] = {}
    failed: list[str] = []
    start = time.monotonic()
    while waiting or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                failed += [name] if process.returncode else []
                end = f"failed, see {out / wanted[name].folder / 'log.txt'}" if process.returncode else "done"
                print(f"[{time.monotonic() - start:5.0f} s] {name}: {end}", flush=True)
        for name, arm in list(waiting.items()):
            if arm.after in failed:
                failed.append(name)
                del waiting[name]
            elif len(running) < jobs and arm.after not in running and arm.after not in waiting:
                folder = out / arm.folder
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / "log.txt", "a", encoding="utf-8") as log:
                    running[name] = subprocess.Popen([*command, "--only", name], stdout=log, stderr=log)
                del waiting[name]
        time.sleep(0.2)
    return failed


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=Path("runs/method"), help="folder of everything")
    found.add_argument("--jobs", type=int, default=1, help="arms at a time")
    found.add_argument("--seeds", type=int, nargs="+", default=[1234], help="of the data order, one comparison each")
    found.add_argument("--groups", nargs="*", default=[], choices=list(GROUPS), help="settings that are varied")
    found.add_argument("--smoke", action="store_true", help="a few tiny steps")
    found.add_argument("--only", metavar="ARM", help="one arm, in this process")
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    for flag, default in zip(FLAGS, fields.values(), strict=True):
        found.add_argument(flag, type=type(default), help=f"without it {default}")
    return found


def asked(options: argparse.Namespace) -> Settings:
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    return Settings(**(SMOKE if options.smoke else {}) | given)


def check_same(settings: Settings, out: Path) -> None:
    """UserError where `out` has arms that were made with other settings."""
    file, now = out / "settings.json", dataclasses.asdict(settings)
    if file.exists() and (before := json.loads(file.read_text())) != now:
        names = [name for name in now if before.get(name) != now[name]]
        raise UserError(f"--out {out}: made with another {', '.join(names)}; name a new folder, or the same settings")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=1))


def main(words: Sequence[str] | None = None) -> int:
    options = parser().parse_args(words)
    settings, out = asked(options), options.out
    wanted = arms(settings, options.seeds, options.groups)
    if options.only:
        run(wanted[options.only], settings, out)
        return 0
    tree = common(settings, out)
    if not tree["preprocess"]["corpora"] or not tree["evaluation"]["corpora"]:
        raise UserError(f"--text {settings.text}: no *.train.jsonl.gz or no *.heldout.jsonl.gz; see method_text.py")
    check_same(settings, out)
    (out / "common.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    if status := megatron_lpr(["preprocess", str(out / "common.yaml")]):
        return status
    command: list[Any] = [sys.executable, Path(__file__), *(sys.argv[1:] if words is None else words)]
    failed = run_all(wanted, out, options.jobs, list(map(str, command)))
    text = tables({name: arm for name, arm in wanted.items() if name not in failed}, settings, out)
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
