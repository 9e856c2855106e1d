"""Preprocesses in small blocks, for tests that kill it or watch its memory.

    preprocess_slowly.py TEXT TOKENIZER OUTPUT WORKERS BLOCK_BYTES [SECONDS per block]

With SECONDS the last block does not come: whoever is to end it may be as late as a busy machine makes it.

Prints the larger peak resident set size of this process and of its workers, in KiB. Ends with 130 at Ctrl-C.
"""

import resource
import sys
import time
from pathlib import Path

from preprocessing import preprocess

from megatron_lpr.data.preprocess import make_corpus, tokenize_parts
from megatron_lpr.recipe.text_settings import SourceConfig


def main(text: str, tokenizer: str, output: str, workers: str, block_bytes: str, seconds: str = "0") -> None:
    make_corpus._LEAST_BLOCK_BYTES = make_corpus.BLOCK_BYTES = make_corpus.BUCKET_BYTES = int(block_bytes)
    tokenize_parts._SMALL_BYTES = 0  # a worker even for one process
    read_blocks = make_corpus.read_blocks

    def slow_blocks(*arguments, **options):
        blocks = iter(read_blocks(*arguments, **options))
        last = next(blocks)
        for block in blocks:
            time.sleep(float(seconds))
            yield last
            last = block
        if float(seconds):
            time.sleep(600)
        yield last

    make_corpus.read_blocks = slow_blocks
    source = SourceConfig(name="hu", files=(text,), language="hu", role="expanded")
    try:
        preprocess([source], tokenizer=tokenizer, output=output, workers=int(workers))
    except KeyboardInterrupt:
        sys.exit(130)
    # Not getrusage: its maximum starts with that of the process that forked this one.
    peak = int(next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM")))
    print(max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))


if __name__ == "__main__":
    main(*sys.argv[1:])
