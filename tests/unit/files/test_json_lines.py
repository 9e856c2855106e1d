"""Lines of JSON: one write each, whatever else happens to the file."""

import json
import os
import re

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import JsonLines, complete_lines, from_json, utc_now


def test_the_time_is_utc_to_a_millisecond():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", utc_now())


def test_a_record_is_one_write(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "x.jsonl")
    writes = []
    monkeypatch.setattr(lines, "_file", type("File", (), {"write": lambda _, data: writes.append(data) or len(data)})())
    lines.append({"text": "é" * 100_000})
    (line,) = writes
    assert json.loads(line) == {"text": "é" * 100_000} and line.endswith(b"\n")


def test_two_writers_share_a_file(tmp_path):
    path = tmp_path / "x.jsonl"
    writers = [JsonLines(path), JsonLines(path)]
    for number in range(10):
        writers[number % 2].append({"number": number}, sync=True)
    assert [from_json(line)["number"] for line in complete_lines(path)] == list(range(10))


def test_a_torn_line_is_closed_and_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"')
    assert list(complete_lines(path)) == [b'{"a": 1}\n']
    JsonLines(path).append({"a": 2})
    assert path.read_bytes() == b'{"a": 1}\n{"a"\n{"a": 2}\n'
    assert [from_json(line) for line in complete_lines(path)] == [{"a": 1}, None, {"a": 2}]


def test_a_file_that_cannot_be_opened_is_a_sentence(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(UserError, match=r"x.jsonl: cannot be written \(Is a directory\)"):
        JsonLines(tmp_path / "x.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_a_sentence(tmp_path):
    (tmp_path / "x.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"x.jsonl: cannot be written \(No space left on device\)"):
        JsonLines(tmp_path / "x.jsonl").append({})
