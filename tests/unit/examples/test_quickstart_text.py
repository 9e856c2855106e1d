"""The committed text is what its README says it is."""

import gzip
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "quickstart" / "text"
FILES = sorted(FOLDER.glob("*.jsonl.gz"))


def documents(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_readme_counts_documents_and_bytes():
    row = re.compile(r"^\| `(\S+\.jsonl\.gz)` \| ([\d,]+) \| ([\d,]+) \|", re.MULTILINE)
    rows = row.findall((FOLDER / "README.md").read_text(encoding="utf-8"))
    stated = {name: (int(count.replace(",", "")), int(size.replace(",", ""))) for name, count, size in rows}
    counted = {}
    for path in FILES:
        texts = [document["text"] for document in documents(path)]
        counted[path.name] = (len(texts), sum(len(text.encode("utf-8")) for text in texts))
    assert stated == counted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_documents_have_a_unique_id_and_text(path):
    found = documents(path)
    assert all(set(document) == {"id", "text"} and document["text"].strip() for document in found)
    assert len({document["id"] for document in found}) == len(found)


def test_no_page_is_both_trained_on_and_held_out():
    train, heldout = (documents(FOLDER / f"lohelp.hu.{split}.jsonl.gz") for split in ("train", "heldout"))
    for key in ("id", "text"):
        assert not {document[key] for document in train} & {document[key] for document in heldout}


def test_notice_names_every_file():
    notice = (FOLDER.parents[2] / "NOTICE").read_text(encoding="utf-8")
    assert {path.name for path in FILES} == set(re.findall(r"\S+\.jsonl\.gz", notice.replace(",", " ")))
