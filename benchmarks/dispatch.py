"""What leaving the frozen expert out of the dispatcher saves: rows sent and computed per expert-parallel rank.

    python benchmarks/dispatch.py [--ranks 4] [--new-experts 12] [--tokens 2048]

One layer, top-2, on local processes (gloo); the same routing for megatron_lpr's layer and Megatron-Core's MoELayer.
Counts do not depend on the machine.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_lpr.testing.dispatch_counts import RankCounts, count_dispatch
from megatron_lpr.testing.run_distributed import run_distributed
from megatron_lpr.testing.toy_models import write_toy_model


def batches(ranks: int) -> dict[str, list[float]]:
    """Share of original-language tokens by rank."""
    half = ranks // 2
    return {
        "original only": [1.0] * ranks,
        "half original, on every rank": [0.5] * ranks,
        "half original, on half the ranks": [1.0] * half + [0.0] * (ranks - half),
        "no original": [0.0] * ranks,
    }


def row(name: str, layer: str, ranks: Sequence[RankCounts], tokens: int) -> str:
    """One line of the table."""
    counts = [getattr(rank, layer) for rank in ranks]
    sent = sum(count.sent_rows for count in counts) / (tokens * len(ranks))
    computed = [count.computed_rows for count in counts]
    most = max(computed) / (sum(computed) / len(computed))
    return f"| {name:32} | {layer:8} | {sent:24.2f} | {most:29.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="expert-parallel ranks")
    parser.add_argument("--new-experts", type=int, default=12, help="divisible by the ranks, and by one rank less")
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank")
    options = parser.parse_args()
    if options.ranks < 2 or options.new_experts % options.ranks or options.new_experts % (options.ranks - 1):
        parser.error("--new-experts must be divisible by --ranks (at least 2) and by one rank less")
    print("| review batch                     | layer    | rows sent per token (2x) | most loaded rank / mean, rows |")
    print("| -------------------------------- | -------- | -----------------------: | ----------------------------: |")
    with tempfile.TemporaryDirectory() as folder:
        base = write_toy_model(Path(folder) / "base")
        cases = batches(options.ranks)
        arguments = base, options.new_experts, options.tokens, list(cases.values())
        by_rank = run_distributed(count_dispatch, options.ranks, *arguments)
    for name, ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        for layer in ("megatron", "ours"):
            print(row(name, layer, ranks, options.tokens))


if __name__ == "__main__":
    main()
