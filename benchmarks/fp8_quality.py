"""What FP8 costs in quality: stages 1 and 2 of the quickstart in bfloat16 and in each FP8 recipe, and bits per byte.

    make quickstart                                          # once: the base model and the corpora
    python benchmarks/fp8_quality.py                         # on a GPU with Transformer Engine
    TE_ON_CPU=.te-2.11.0 python benchmarks/fp8_quality.py    # with its kernels emulated; `make test-te` gets the folder
    python benchmarks/fp8_quality.py --set train.steps=2 --set optimizer.warmup_steps=0     # to see that it works

Held-out text is scored in bfloat16 after each stage. A number at the right is that of an FP8 run over bfloat16's: 1.000
is no loss. Runs that are there already are not made again.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if os.environ.get("TE_ON_CPU"):
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    importlib.import_module("te_on_cpu").install_on_import()  # before Megatron-Core is imported

from megatron_lpr import api  # noqa: E402
from megatron_lpr.evaluation.retention import EvaluationResult  # noqa: E402
from megatron_lpr.recipe.reading import load_recipe  # noqa: E402

IN_BF16 = "none"


def run(options: argparse.Namespace, stage: str, fp8: str) -> EvaluationResult:
    """One stage in one recipe, trained and scored, or what was scored before."""
    folder = options.out / fp8
    scored = folder / f"{stage}.json"
    if scored.exists():
        return EvaluationResult.load(scored)
    load = folder / "stage1" if stage == "stage2" else "null"
    recipe = load_recipe(
        ROOT / f"examples/quickstart/recipes/{stage}.yaml",
        [
            f"output={folder / stage}",
            f"model.base={options.base}",
            f"model.load={load}",
            "model.dtype=bfloat16",
            "model.spec=te",
            f"data.manifest={options.manifest}",
            f"fp8.recipe={fp8}",
            *options.set,
        ],
    )
    api.train(api.plan(recipe))
    result = api.evaluate(folder / stage, name=f"{stage} {fp8}")
    result.save(scored)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["tensorwise", "blockwise"], help="of FP8, beside bfloat16")
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart/base"), help="folder of the base model")
    parser.add_argument(
        "--manifest", type=Path, default=Path("runs/quickstart/data/manifest.yaml"), help="of the corpora"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_quality"), help="folder of the runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of both stages")
    options = parser.parse_args()
    os.chdir(ROOT)  # recipes name their files from the top of the project
    recipes = [IN_BF16, *options.recipes]
    scores = {}
    for fp8 in recipes:
        for stage in ("stage1", "stage2"):
            for corpus in run(options, stage, fp8).corpora:
                scores[stage, corpus.name, fp8] = corpus.bits_per_byte
    print(f"\n| after  | held-out text | bfloat16 | {' | '.join(f'{fp8:>10} |  ratio' for fp8 in recipes[1:])} |")
    print(f"| ------ | ------------- | -------: | {' | '.join('---------: | -----:' for _ in recipes[1:])} |")
    worst = 1.0
    for stage, corpus in dict.fromkeys((stage, corpus) for stage, corpus, _ in scores):
        plain, *others = (scores[stage, corpus, fp8] for fp8 in recipes)
        cells = " | ".join(f"{bits:10.4f} | {bits / plain:6.4f}" for bits in others)
        print(f"| {stage} | {corpus:13} | {plain:8.4f} | {cells} |")
        worst = max([worst, *(bits / plain for bits in others)])
    print(f"\nBits per UTF-8 byte. The largest ratio is {worst:.4f}.")


if __name__ == "__main__":
    main()
