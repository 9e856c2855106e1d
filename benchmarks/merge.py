"""What merging parts costs by their number: synthetic parts, as small as the key ranges are made for them.

    python benchmarks/merge.py [--parts 100 1000 10000] [--documents 16] [--rounds 3]

In a corpus, a part has about 8 MiB and a key range 64 MiB; here both are 1/512 of that, so the counts of files, ranges
and slices are those of a corpus of 512 times the size. Seconds of CPU; the best round counts.
"""

import argparse
import os
import resource
import tempfile
import time

import numpy as np

from megatron_lpr.data.corpus.indexed import IndexedWriter
from megatron_lpr.data.preprocess.parts import BUCKET_BYTES, Part, merge, part_path, write_part
from megatron_lpr.data.preprocess.work_folder import combine_parts, fan_in

SCALE = 512
TOKENS = 512


def write_parts(folder: str, count: int, documents: int) -> list[Part]:
    generator = np.random.default_rng(0)
    parts = []
    for number in range(count):
        keys = generator.integers(0, 1 << 64, documents, np.uint64, endpoint=False)
        texts = list(generator.integers(0, 60_000, (documents, TOKENS)).astype(np.uint16))
        record = write_part(part_path(folder, number, number), keys, texts, None, np.uint16)
        parts.append(Part(folder=folder, first=number, last=number, record=record))
    return parts


def merged(folder: str, parts: list[Part]) -> tuple[float, float, str]:
    """CPU seconds of combining, CPU seconds in all, digest."""
    start = time.process_time()
    parts = combine_parts(parts, fan_in(), np.uint16, bucket_bytes=BUCKET_BYTES // SCALE, done=lambda tokens: None)
    combined = time.process_time() - start
    with IndexedWriter(f"{folder}/corpus", 60_000) as writer:
        for documents in merge(parts, np.uint16, bucket_bytes=BUCKET_BYTES // SCALE):
            writer.add_documents(documents.tokens, documents.lengths)
    return combined, time.process_time() - start, writer.digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--documents", type=int, default=16, help=f"of {TOKENS} tokens, in each part")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print("|  parts |  MB  | combining s | CPU s | ms per part | digest       |")
    print("| -----: | ---: | ----------: | ----: | ----------: | ------------ |")
    for count in arguments.parts:
        best = (float("inf"), float("inf"), "")
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as folder:
                best = min(best, merged(folder, write_parts(folder, count, arguments.documents)), key=lambda b: b[1])
        combining, seconds, digest = best
        size = count * arguments.documents * TOKENS * 2 / 1e6
        print(
            f"| {count:6,} | {size:4.0f} | {combining:11.2f} | {seconds:5.2f} | {seconds / count * 1e3:11.2f} "
            f"| {digest[:12]} |"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory {peak:.0f} MB, {len(os.listdir('/proc/self/fd'))} files open")


if __name__ == "__main__":
    main()
