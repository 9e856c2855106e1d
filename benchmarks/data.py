"""The replay sampler against Megatron-Core's GPTDataset and BlendedDataset, on the same two .bin/.idx corpora.

    python benchmarks/data.py [--documents 100000 1000000 10000000] [--json results.json]

For each size both run in processes of their own, one after the other: time and peak memory (page cache not counted) up
to the first batch (8 samples of 4,096 tokens), then samples per second from the page cache. Megatron's samples are not
even stacked to a batch; ours are, in one set of arrays (samples/s) or read ahead by a thread, as training does.
Megatron's index files go to a fresh folder, as in a first run; the sampler has none. `picks` and `warm window` (the
same samples again, in the same arrays) are per core.
"""

import argparse
import json
import logging
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

SEQ_LENGTH, BATCH, SEED, VOCAB_SIZE, EOD = 4096, 8, 1234, 32000, 2
NAMES = ("hu", "en")
WEIGHTS = (0.7, 0.3)
UINT16 = 8  # Megatron's dtype code


def write_corpus(prefix: Path, documents: int, seed: int) -> int:
    """Random documents of 8 to 120 tokens, one sequence each; returns the number of tokens."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(8, 121, documents, dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(f"{prefix}.idx", "wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, UINT16, documents, documents + 1))
        for part in (lengths, 2 * (ends - lengths), np.arange(documents + 1, dtype=np.int64)):
            index.write(part.tobytes())
    tokens = int(ends[-1])
    with open(f"{prefix}.bin", "wb") as file:
        for first in range(0, tokens, 1 << 24):
            size = min(1 << 24, tokens - first)
            file.write(generator.integers(3, VOCAB_SIZE, size, dtype=np.uint16).tobytes())
    return tokens


def ours(folder: Path, documents: int, tokens: list[int]) -> dict[str, float]:
    """Seconds and bytes to the first batch, samples/s, picks/s and microseconds per window of the replay sampler."""
    from megatron_lpr.data.corpus.manifest import Corpus, Manifest, TokenizerRecord
    from megatron_lpr.data.corpus.spot_check import spot_digests
    from megatron_lpr.data.sampler.replay_sampler import Batch, ReplaySampler

    corpora = tuple(
        Corpus(
            name=name,
            prefix=str(folder / name),
            language=name,
            role=role,
            documents=documents // 2,
            tokens=count,
            digest=str(number) * 64,
            index_digest="0" * 64,
            spot_digests=spot_digests(str(folder / name), str(number) * 64, languages=False),
        )
        for number, (name, role, count) in enumerate(zip(NAMES, ("expanded", "original"), tokens, strict=True))
    )
    tokenizer = TokenizerRecord(
        name="random", vocab_size=VOCAB_SIZE, sha256="0" * 64, eod_id=EOD, parse_special_tokens=True
    )
    manifest = Manifest(path=str(folder / "manifest.yaml"), tokenizer=tokenizer, corpora=corpora)

    def build() -> ReplaySampler:
        mixture = dict(zip(("expanded", "original"), WEIGHTS, strict=True))
        return ReplaySampler(manifest, seq_length=SEQ_LENGTH, seed=SEED, mixture=mixture)

    manifest.save()
    sampler, result = to_first_batch(lambda: Manifest.load(manifest.path) and build(), lambda s: s.fill(0, BATCH))
    samples = sum(tokens) // SEQ_LENGTH
    batches = min(samples, 4000) // BATCH
    same = Batch.empty(BATCH, SEQ_LENGTH)
    result["samples_per_second"] = batches * BATCH / best(lambda i: sampler.fill(i * BATCH, BATCH, same), batches)
    reader = sampler.batches(0, BATCH, BATCH, read_ahead=2)
    result["read_ahead_per_second"] = batches * BATCH / best(lambda i: next(reader), batches)
    picks = 5_000_000
    result["picks_per_second"] = picks / best(lambda i: sampler.picks(0, picks))
    result["microseconds_per_window"] = best(lambda i: sampler.fill(0, BATCH, same), 200) / (200 * BATCH) * 1e6
    return result


def megatron(folder: Path, documents: int, tokens: list[int]) -> dict[str, float]:
    """The same of Megatron-Core, where it has it."""
    import torch

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # the builder asks for a process group
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = VOCAB_SIZE, EOD, 0, {"class": "random"}

    samples = sum(tokens) // SEQ_LENGTH
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend=([str(folder / name) for name in NAMES], list(WEIGHTS)),
        split="1,0,0",
        path_to_cache=tempfile.mkdtemp(dir=folder),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset, result = to_first_batch(
        lambda: BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0],
        lambda dataset: [dataset[i] for i in range(BATCH)],
    )
    read = min(samples, 1000)
    result["samples_per_second"] = read / best(dataset.__getitem__, read)
    return result


def to_first_batch(build: Callable, read: Callable) -> tuple[object, dict[str, float]]:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, mapped, start = memory("VmRSS"), memory("RssFile"), time.perf_counter()
    built = build()
    read(built)
    seconds = time.perf_counter() - start
    # without pages of mapped files, which belong to the page cache
    return built, {"seconds": seconds, "bytes": memory("VmHWM") - before - (memory("RssFile") - mapped)}


def memory(field: str) -> int:
    """Resident bytes of this process: all (VmRSS), at their peak (VmHWM), or of mapped files (RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def best(work: Callable[[int], object], count: int = 1, times: int = 3) -> float:
    """Seconds of work(0), ..., work(count - 1), the fastest of some runs: what else the machine does weighs little."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        for i in range(count):
            work(i)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def in_process(function: str, folder: Path, documents: int, tokens: list[int]) -> dict[str, float]:
    arguments = [function, str(folder), str(documents), json.dumps(tokens)]
    run = subprocess.run([sys.executable, __file__, "--worker", *arguments], stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.decode().splitlines()[-1])


def compare(documents: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        tokens = [write_corpus(Path(folder) / name, documents // 2, seed) for seed, name in enumerate(NAMES)]
        return {name: in_process(name, Path(folder), documents, tokens) for name in ("ours", "megatron")}


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| documents | | first batch | memory | samples/s | read ahead | picks/s | warm window |",
        "| --------: | --- | ----------: | -----: | --------: | ---------: | ------: | ----------: |",
    ]
    for documents, result in results.items():
        for name, label in (("ours", "replay sampler"), ("megatron", "Megatron-Core")):
            of = result[name]
            picks = f"{of['picks_per_second'] / 1e6:.1f}M" if "picks_per_second" in of else ""
            ahead = f"{of['read_ahead_per_second']:,.0f}" if "read_ahead_per_second" in of else ""
            window = f"{of['microseconds_per_window']:.1f} µs" if "microseconds_per_window" in of else ""
            lines.append(
                f"| {documents:,} | {label} | {of['seconds'] * 1e3:,.1f} ms | {of['bytes'] / 1e6:,.1f} MB "
                f"| {of['samples_per_second']:,.0f} | {ahead} | {picks} | {window} |"
            )
        peer = result["megatron"]["samples_per_second"]
        ratio, ahead = (result["ours"][name] / peer for name in ("samples_per_second", "read_ahead_per_second"))
        sooner = result["megatron"]["seconds"] / result["ours"]["seconds"]
        lines.append(f"| {documents:,} | ratio | {sooner:,.0f}x | | {ratio:,.0f}x | {ahead:,.0f}x | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10**5, 10**6, 10**7], help="sizes, both corpora")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        function, folder, documents, tokens = options.worker
        print(json.dumps(globals()[function](Path(folder), int(documents), json.loads(tokens))))
        return
    results = {documents: compare(documents) for documents in options.documents}
    print(table(results))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
