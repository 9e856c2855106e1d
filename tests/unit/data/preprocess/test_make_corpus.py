"""How a corpus is made: its order, all cores, what a kill leaves behind, memory."""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from preprocessing import files, left_of, preprocess, run

from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.preprocess import make_corpus, tokenize_parts, work_folder
from megatron_lpr.data.text.text_files import files_sha256
from megatron_lpr.data.text.tokenize import HFTokenizer, load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import SourceConfig

SCRIPT = Path(__file__).parents[3] / "helpers" / "preprocess_slowly.py"
TEXTS = [f"the quick fox number {number} árvíz" * (1 + number % 3) for number in range(600)]


def test_order_is_that_of_a_keyed_hash_of_the_places(write_text, hf_tokenizer, tmp_path, small_blocks):
    path = write_text("a.jsonl", TEXTS)
    run(path, hf_tokenizer, tmp_path / "out", workers=1, seed=7)
    key = struct.pack("<Q", 7) + bytes.fromhex(files_sha256([path]))
    offset, keyed = 0, []
    for line, text in zip(Path(path).read_bytes().splitlines(keepends=True), TEXTS, strict=True):
        digest = hashlib.blake2b(struct.pack("<QQ", 0, offset), key=key, digest_size=8).digest()
        keyed.append((int.from_bytes(digest, "little"), text))
        offset += len(line)
    tokenizer = load_tokenizer(hf_tokenizer)
    expected = [[*tokenizer.encode_batch([text])[0], tokenizer.eod_id] for _, text in sorted(keyed)]
    corpus = IndexedCorpus(str(tmp_path / "out" / "hu"))
    assert [corpus.document(index).tolist() for index in range(len(corpus))] == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf_tokenizer", "sp_tokenizer"])
def test_blocks_memory_and_processes_change_nothing(request, write_text, tmp_path, monkeypatch, kind):
    path, tokenizer = write_text("a.jsonl", TEXTS), request.getfixturevalue(kind)
    run(path, tokenizer, tmp_path / "whole", workers=1)
    for number, (block, bucket, workers) in enumerate([(2048, 700, 1), (8000, 1 << 20, 2)]):
        monkeypatch.setattr(make_corpus, "BLOCK_BYTES", block)
        monkeypatch.setattr(make_corpus, "_LEAST_BLOCK_BYTES", block)
        monkeypatch.setattr(make_corpus, "BUCKET_BYTES", bucket)
        run(path, tokenizer, tmp_path / str(number), workers=workers)
        assert files(tmp_path / str(number)) == files(tmp_path / "whole")


def test_documents_end_up_anywhere(write_text, hf_tokenizer, tmp_path, small_blocks):
    run(write_text("a.jsonl", [f"fox {number}" for number in range(2000)]), hf_tokenizer, tmp_path / "out", workers=1)
    tokenizer = load_tokenizer(hf_tokenizer)
    number_of = {(*tokenizer.encode_batch([f"fox {n}"])[0], tokenizer.eod_id): n for n in range(2000)}
    corpus = IndexedCorpus(str(tmp_path / "out" / "hu"))
    order = [number_of[tuple(corpus.document(index).tolist())] for index in range(2000)]
    # Serial correlation of a random order of n has standard deviation 1 / sqrt(n).
    mean = sum(order) / 2000
    pairs = sum((a - mean) * (b - mean) for a, b in zip(order, order[1:], strict=False))
    assert abs(pairs / sum((a - mean) ** 2 for a in order)) < 3 / 2000**0.5


def test_killed_by_sigkill_it_continues_to_the_same_bytes(write_text, hf_tokenizer, tmp_path):
    path = write_text("a.jsonl", TEXTS)
    arguments = [sys.executable, str(SCRIPT), path, hf_tokenizer]
    subprocess.run([*arguments, str(tmp_path / "whole"), "1", "4096"], check=True, capture_output=True)

    command = [*arguments, str(tmp_path / "out"), "2", "4096"]
    process = subprocess.Popen([*command, "0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out" / "hu.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.json"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(family) >= 2 and not left_of(family), "workers outlive their parent"
    finished = len(list(parts.glob("0*.json")))
    assert finished >= 3 and not (tmp_path / "out" / "hu.idx").exists()
    # A kill in the middle of a write, and a part damaged by whatever killed the machine.
    (parts / "99999999.part.partial").write_bytes(b"half")
    damaged = sorted(parts.glob("*.part"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")

    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"hu: {finished - 1} of " in again.stderr and "parts were there from an earlier run" in again.stderr
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_interrupted_by_ctrl_c_it_continues_to_the_same_bytes(write_text, hf_tokenizer, tmp_path, workers):
    path = write_text("a.jsonl", TEXTS * 5)
    arguments = [sys.executable, str(SCRIPT), path, hf_tokenizer]
    subprocess.run([*arguments, str(tmp_path / "whole"), "2", "20000"], check=True, capture_output=True)
    parts = tmp_path / "out" / "hu.parts"
    for _ in range(2):
        before = len(list(parts.glob("0*.json")))
        process = subprocess.Popen(
            [*arguments, str(tmp_path / "out"), workers, "20000", "0.5"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while len(list(parts.glob("0*.json"))) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in errors, f"{process.returncode}: {errors}"
        assert "interrupted; what was finished is kept: run the same command again" in errors
        assert not left_of(family)
    again = subprocess.run([*arguments, str(tmp_path / "out"), workers, "20000"], capture_output=True, text=True)
    assert "parts were there from an earlier run" in again.stderr
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("when", ["merge", "close", "manifest"])
def test_killed_after_tokenisation(write_text, hf_tokenizer, tmp_path, small_blocks, monkeypatch, capsys, when):
    path = write_text("a.jsonl", TEXTS)
    run(path, hf_tokenizer, tmp_path / "whole", workers=1)

    class Killed(BaseException):
        pass

    def kill(*arguments, **options):
        raise Killed

    from megatron_lpr.data.corpus.indexed import IndexedWriter
    from megatron_lpr.data.corpus.manifest import Manifest

    target = {"merge": (make_corpus, "merge"), "close": (IndexedWriter, "close"), "manifest": (Manifest, "save")}[when]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*target, kill)
        run(path, hf_tokenizer, tmp_path / "out", workers=1)
    capsys.readouterr()
    run(path, hf_tokenizer, tmp_path / "out", workers=1)
    parts = capsys.readouterr().err.split("hu: ")[-1]
    kept, of, total, *_ = parts.split()
    assert (of, kept) == ("of", total)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_parts_of_something_else_are_not_used(write_text, hf_tokenizer, tmp_path, small_blocks, capsys):
    path = write_text("a.jsonl", [*TEXTS, b"{"])
    with pytest.raises(UserError, match="a.jsonl:601: broken JSON"):
        run(path, hf_tokenizer, tmp_path / "out", workers=1)
    parts = len(list((tmp_path / "out" / "hu.parts").glob("*.part")))
    assert parts > 5  # what was finished is of use to a run that skips bad lines
    path = write_text("a.jsonl", TEXTS[:-1])
    capsys.readouterr()
    assert run(path, hf_tokenizer, tmp_path / "out", workers=1).corpora[0].documents == 599
    errors = capsys.readouterr().err
    assert "made from something else" in errors and "parts were there" not in errors


def test_a_refused_run_continues_when_told_to_skip(write_text, hf_tokenizer, tmp_path, small_blocks, capsys):
    path = write_text("a.jsonl", [*TEXTS, b"{", b"{"])
    with pytest.raises(UserError, match="a.jsonl:601"):
        run(path, hf_tokenizer, tmp_path / "out", workers=1)
    corpus = run(path, hf_tokenizer, tmp_path / "out", workers=1, on_bad_line="skip").corpora[0]
    assert (corpus.documents, corpus.source.skipped_lines) == (600, 2)
    assert "parts were there" in capsys.readouterr().err
    listed = (tmp_path / "out" / "hu.bad_lines.txt").read_text().splitlines()
    assert listed == [f"{path}:{line}: broken JSON" for line in (601, 602)]


def test_a_killed_worker_is_told(write_text, hf_tokenizer, tmp_path, small_blocks, monkeypatch):
    read_blocks = make_corpus.read_blocks
    others = set(psutil.Process().children())  # of earlier tests, as Megatron's

    def kill_a_worker(*arguments, **options):
        for number, block in enumerate(read_blocks(*arguments, **options)):
            if number == 8:
                max(
                    set(psutil.Process().children()) - others, key=lambda child: (child.create_time(), child.pid)
                ).kill()
            yield block

    monkeypatch.setattr(make_corpus, "read_blocks", kill_a_worker)
    with pytest.raises(UserError, match="a tokenisation process was killed.*finished parts are kept"):
        run(write_text("a.jsonl", TEXTS), hf_tokenizer, tmp_path / "out", workers=2)


@pytest.mark.slow
def test_a_killed_single_process_is_told_too(hf_tokenizer, tmp_path, monkeypatch):
    """A document of 24 MB takes 3 GB; here the process may have 1.5 GB, and dies as by the system's hand."""
    (tmp_path / "a.txt").write_text("the quick brown fox jumps " * 1_000_000)
    monkeypatch.setattr(tokenize_parts, "_start_worker", _start_small_worker)
    with pytest.raises(UserError, match="a tokenisation process was killed, perhaps for want of memory"):
        run(str(tmp_path / "a.txt"), hf_tokenizer, tmp_path / "out", workers=1, max_document_bytes=0)


def _start_small_worker(*arguments) -> None:
    tokenize_parts._start_worker(*arguments)
    resource.setrlimit(resource.RLIMIT_AS, (1500 << 20, 1500 << 20))


@pytest.fixture
def workers_left(monkeypatch):
    """Processes that were there, and might still write, whenever it was looked whether the work folder may go."""
    found, of_other_tests = [], set(multiprocessing.active_children())

    def scandir(folder, scan=os.scandir):
        found.extend(set(multiprocessing.active_children()) - of_other_tests)
        return scan(folder)

    monkeypatch.setattr(work_folder.os, "scandir", scandir)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("text", [True, False])
def test_a_long_document_is_a_bad_line(write_text, hf_tokenizer, tmp_path, capsys, text, workers_left):
    if text:
        path = str(tmp_path / "a.txt")
        Path(path).write_text("fox\n" * 300)
        (tmp_path / "b.txt").write_text("fox")
        paths = (path, str(tmp_path / "b.txt"))
    else:
        paths = (write_text("a.jsonl", ["ű" * 501, "ű" * 500]),)
    source = SourceConfig(name="hu", files=paths, language="hu", role="expanded")
    options = {"tokenizer": hf_tokenizer, "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"a\.\w+:1: document of more than 1,000 bytes .it has 1,\d+; divide it, or"):
        preprocess([source], max_document_bytes=1000, **options)
    assert workers_left == []
    made = preprocess([source], max_document_bytes=1000, on_bad_line="skip", **options)
    assert (made.corpora[0].documents, made.corpora[0].source.skipped_lines) == (1, 1)
    assert "left out 1 lines (document of more than 1,000 bytes)" in capsys.readouterr().err
    with pytest.raises(UserError, match="made from other text, in another way"):
        preprocess([source], **options)
    assert preprocess([source], overwrite=True, **options).corpora[0].documents == 2


def test_the_tokenizer_gets_few_bytes_at_once(write_text, hf_tokenizer, tmp_path, monkeypatch):
    batches = []

    def encode_batch(self, texts, encode=HFTokenizer.encode_batch):
        batches.append([len(text.encode()) for text in texts])
        return encode(self, texts)

    monkeypatch.setattr(tokenize_parts, "_BATCH_BYTES", 5000)
    monkeypatch.setattr(HFTokenizer, "encode_batch", encode_batch)
    run(write_text("a.jsonl", ["ű" * 2000, "é" * 400, "fox", "ű" * 9000, "dog"]), hf_tokenizer, tmp_path / "out")
    assert batches == [[4000, 800, 3], [18000], [3]]


def test_a_full_disk_is_told_and_nothing_is_lost(write_text, hf_tokenizer, tmp_path, small_blocks, capsys):
    path = write_text("a.jsonl", TEXTS)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # parts fit, the corpus does not
    try:
        with pytest.raises(UserError, match="cannot write .*hu.*: File too large"):
            run(path, hf_tokenizer, tmp_path / "out", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert run(path, hf_tokenizer, tmp_path / "out", workers=1).corpora[0].documents == 600
    assert "parts were there from an earlier run" in capsys.readouterr().err
    assert sorted(files(tmp_path / "out")) == ["hu.bin", "hu.idx", "manifest.yaml"]


def test_memory_does_not_grow_with_the_corpus(hf_tokenizer, tmp_path):
    words = [f"{number:x}fox" for number in range(1000)]
    generator = random.Random(0)

    def peak(name: str, documents: int) -> int:
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for _ in range(documents):
                file.write(json.dumps({"text": " ".join(generator.choices(words, k=160))}) + "\n")
        command = [sys.executable, str(SCRIPT), str(tmp_path / f"{name}.jsonl"), hf_tokenizer]
        command += [str(tmp_path / name), "1", str(1 << 18)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}  # threads take memory as they please
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(run.stdout) << 10

    small, large = peak("small", 2000), peak("large", 17_000)
    grown = os.path.getsize(tmp_path / "large.jsonl") - os.path.getsize(tmp_path / "small.jsonl")
    assert grown > 15_000_000 and IndexedCorpus(str(tmp_path / "large" / "hu")).num_tokens > 7_000_000
    # Holding the text, or the tokens at two bytes each, would take 15 MB more.
    assert large - small < 10_000_000
    shutil.rmtree(tmp_path / "large")
