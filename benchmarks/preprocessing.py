"""Our preprocessing against a transformers tokenizer with Megatron-Core's IndexedDatasetBuilder, on the same text.

    python benchmarks/preprocessing.py runs/quickstart/base [--megabytes 32] [--workers 2] [--rounds 3] [FILE ...]

The peer does what Megatron-LM's tools/preprocess_data.py does: a pool of processes reads JSON lines and calls the
tokenizer on each text, one process writes. It neither shuffles, nor hashes, nor can continue after a kill; ours does
all that inside the time given. The peer's clock starts after its imports. They take turns, the best round counts.
Peak memory is the largest sum of the resident set sizes of all processes of a run. All must write the same documents;
that with `heldout` a thousandth fewer, which lie in the file beside.
"""

import argparse
import gzip
import importlib.util
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import psutil

TEXT = sorted((Path(__file__).parent.parent / "examples" / "quickstart" / "text").glob("*.train.jsonl.gz"))


Cost = tuple[float, float]  # seconds, CPU seconds


def ours(tokenizer: str, text: str, folder: str, workers: int) -> Cost:
    return _preprocess(tokenizer, text, folder, workers, "tokenizers")


def ours_fast(tokenizer: str, text: str, folder: str, workers: int) -> Cost:
    return _preprocess(tokenizer, text, folder, workers, "fastokens")


def ours_held_out(tokenizer: str, text: str, folder: str, workers: int) -> Cost:
    return _preprocess(tokenizer, text, folder, workers, "tokenizers", heldout=0.001)


def _preprocess(tokenizer: str, text: str, folder: str, workers: int, engine: str, heldout: float = 0.0) -> Cost:
    from megatron_lpr.data.preprocess.preprocess import preprocess
    from megatron_lpr.recipe.text_settings import PreprocessConfig, SourceConfig

    start = clock()
    source = SourceConfig(name="corpus", files=(text,), language="xx", role="expanded")
    preprocess(
        PreprocessConfig(
            corpora=(source,), tokenizer=tokenizer, output=folder, workers=workers, engine=engine, heldout=heldout
        )
    )
    return since(start)


def peer(tokenizer: str, text: str, folder: str, workers: int) -> Cost:
    global _tokenizer
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    os.makedirs(folder, exist_ok=True)
    _tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    start = clock()
    builder = IndexedDatasetBuilder(f"{folder}/corpus.bin", dtype=DType.optimal_dtype(len(_tokenizer)))
    with multiprocessing.get_context("fork").Pool(workers) as pool, open(text, encoding="utf-8") as lines:
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(ids, [len(ids)])
        pool.close()
        pool.join()  # so that its CPU seconds count
    builder.finalize(f"{folder}/corpus.idx")
    return since(start)


def _encode(line: str) -> list[int]:
    return [*_tokenizer(json.loads(line)["text"])["input_ids"], _tokenizer.eos_token_id]


def measured(connection, run, *arguments) -> None:
    """Sends the seconds of `run`, and of this process and its children the CPU seconds and peak memory in bytes."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    sys.stderr = open(os.devnull, "w")
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, done), daemon=True)
    watcher.start()
    seconds, cpu = run(*arguments)
    done.set()
    watcher.join()
    connection.send((seconds, cpu, peak[0]))


def clock() -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)


def since(start: tuple[float, float]) -> Cost:
    now = clock()
    return now[0] - start[0], now[1] - start[1]


def _watch(peak: list[int], done: threading.Event) -> None:
    process = psutil.Process()
    while not done.wait(0.1):
        try:
            family = [process, *process.children(recursive=True)]
            peak[0] = max(peak[0], sum(member.memory_info().rss for member in family))
        except psutil.NoSuchProcess:
            continue


def write_text(path: str, files: list[Path], megabytes: int) -> int:
    """The documents of `files` over and over, as JSON lines, until there are `megabytes` of text; their bytes."""
    documents = []
    for file in files:
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt", encoding="utf-8") as lines:
            documents += [json.loads(line)["text"] for line in lines]
    size = 0
    with open(path, "w", encoding="utf-8") as out:
        for text in cycle(documents):
            if size >= megabytes * 1_000_000:
                return size
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
    raise AssertionError("no text")


def documents(folder: str) -> Counter:
    from megatron_lpr.data.corpus.indexed import IndexedCorpus

    corpus = IndexedCorpus(f"{folder}/corpus")
    return Counter(corpus.document(index).tobytes() for index in range(len(corpus)))


def held_out(folder: str) -> int:
    path = Path(f"{folder}/corpus.heldout.jsonl.gz")
    return gzip.open(path).read().count(b"\n") if path.exists() else 0


def main() -> None:
    from megatron_lpr.files.cores import usable_cores

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="folder with a tokenizer.json")
    parser.add_argument("files", nargs="*", type=Path, default=TEXT, help="JSON lines, .gz too (default: quickstart's)")
    parser.add_argument("--megabytes", type=int, default=32, help="of text, which is repeated as needed")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    runs = [ours, ours_held_out, *([ours_fast] if importlib.util.find_spec("fastokens") else []), peer]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        text = f"{scratch}/text.jsonl"
        size = write_text(text, arguments.files, arguments.megabytes)
        best: dict[str, tuple[float, float, int]] = {}
        for number in range(arguments.rounds):
            for run in runs:
                receiver, sender = context.Pipe(duplex=False)
                folder = f"{scratch}/{run.__name__}{number}"
                process = context.Process(
                    target=measured, args=(sender, run, arguments.tokenizer, text, folder, arguments.workers)
                )
                process.start()
                result = receiver.recv()
                process.join()
                old = best.get(run.__name__, result)
                best[run.__name__] = (min(result[0], old[0]), min(result[1], old[1]), max(result[2], old[2]))
        written = documents(f"{scratch}/ours0")
        for run in runs:
            own = documents(f"{scratch}/{run.__name__}0")
            missing = (written - own).total()
            assert own <= written and missing == held_out(f"{scratch}/{run.__name__}0"), (
                "they wrote different documents"
            )
        tokens = sum(len(document) * count for document, count in written.items()) // _token_bytes(f"{scratch}/ours0")
    print(f"{size / 1e6:.0f} MB of text, {tokens:,} tokens, {arguments.workers} processes\n")
    print("| preprocessing                          | seconds | MB/s | tokens/s | CPU s | peak memory | speed |")
    print("| -------------------------------------- | ------: | ---: | -------: | ----: | ----------: | ----: |")
    labels = {
        "ours": "megatron_lpr",
        "ours_held_out": "megatron_lpr, heldout: 0.001",
        "ours_fast": "megatron_lpr, engine: fastokens",
    }
    for run in runs:
        label = labels.get(run.__name__, "transformers + IndexedDatasetBuilder")
        seconds, cpu, memory = best[run.__name__]
        row = f"| {label:38} | {seconds:7.1f} | {size / 1e6 / seconds:4.2f} | {tokens / seconds:8,.0f} | {cpu:5.1f} "
        print(f"{row}| {memory / 1e6:8.0f} MB | {best['peer'][0] / seconds:4.2f}x |")


def _token_bytes(folder: str) -> int:
    from megatron_lpr.data.corpus.indexed import IndexedCorpus

    return IndexedCorpus(f"{folder}/corpus").tokens.itemsize


if __name__ == "__main__":
    main()
