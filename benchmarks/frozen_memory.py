"""What the frozen weights take of a rank's memory, as copies and sharded, on 1, 2 and 4 ranks; and what each reads.

    python benchmarks/frozen_memory.py [--hidden 512] [--layers 8] [--ranks 1 2 4]

Every rank builds the model of a review (routers learn, one frozen and two new experts) of a random base and fills it.
Measured are the bytes of frozen weights that it holds, by how much its resident memory has grown, and what it has read.
"""

import argparse
import os
import tempfile
from pathlib import Path

from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.testing.run_distributed import run_distributed
from megatron_lpr.testing.toy_models import write_toy_model


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def fill(base: Path, frozen: str) -> tuple[int, int, int]:
    """On one rank: bytes of frozen weights held, growth of the resident memory, bytes read of the base."""
    from megatron_lpr.families import read_architecture
    from megatron_lpr.platform import megatron

    tree = {
        "name": "memory",
        "output": "none",
        "model": {"base": str(base), "num_experts": 3},
        "train": {"trainable": "routers", "steps": 1},
        "parallel": {"frozen": frozen},
    }
    recipe = from_tree(Recipe, tree, where="benchmark")
    with megatron():
        from megatron_lpr.model.builder import init_model_parallel
        from megatron_lpr.model.load.weights import fill_weights
        from megatron_lpr.model.sharding import build_frozen
        from megatron_lpr.platform.shards import own_part

        init_model_parallel(recipe.parallel)
        before = resident()
        chunks = build_frozen(recipe, read_architecture(base))
        read = fill_weights(recipe, read_architecture(base), chunks, None)
        grown = resident() - before
        frozen_weights = [p for chunk in chunks for p in chunk.parameters() if not p.requires_grad]
        return sum(own_part(parameter).nbytes for parameter in frozen_weights), grown, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = write_toy_model(
            Path(folder) / "base",
            hidden_size=args.hidden,
            intermediate_size=4 * args.hidden,
            num_hidden_layers=args.layers,
            head_dim=args.hidden // 4,
        )
        print(f"the base has {(base / 'model.safetensors').stat().st_size / 1e6:.0f} MB; MB of the largest rank")
        print("| ranks | frozen     | weights held | memory grown by | read of the base | by all ranks |")
        print("| ----: | ---------- | -----------: | --------------: | ---------------: | -----------: |")
        for ranks in args.ranks:
            for frozen in ("replicated", "sharded") if ranks > 1 else ("replicated",):
                of_ranks = run_distributed(fill, ranks, base, frozen)
                held, grown, read = (max(column) / 1e6 for column in zip(*of_ranks, strict=True))
                total = sum(read for _, _, read in of_ranks) / 1e6
                print(
                    f"| {ranks:5} | {frozen:10} | {held:12.1f} | {grown:15.1f} | {read:16.1f} | {total:12.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
