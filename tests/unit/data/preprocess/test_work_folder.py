"""Many parts combined to few: whatever happens meanwhile, the corpus is the same."""

import json
import os
import resource

import pytest
from preprocessing import files, preprocess, run

from megatron_lpr.data.preprocess import work_folder
from megatron_lpr.data.preprocess.parts import PartCursor, PartWriter
from megatron_lpr.recipe.text_settings import SourceConfig

TEXTS = [f"the quick fox number {number} árvíz" * (1 + number % 3) for number in range(600)]


@pytest.mark.slow
@pytest.mark.parametrize("languages", [{}, {"hu": "expanded", "en": "original"}])
@pytest.mark.parametrize("most", [2, 3, 10, 1000])
def test_parts_combined_before_the_merge_change_nothing(
    write_text, hf_tokenizer, tmp_path, small_blocks, monkeypatch, capsys, most, languages
):
    lines = [json.dumps({"text": text, "lang": ["hu", "en"][i % 7 < 3]}).encode() for i, text in enumerate(TEXTS)]
    settings = {"languages": languages, "language_field": "lang" if languages else None}
    source = SourceConfig(name="hu", files=(write_text("a.jsonl", lines),), language="hu", role="expanded", **settings)
    preprocess([source], tokenizer=hf_tokenizer, output=str(tmp_path / "whole"), workers=1)
    assert "hu combined" not in capsys.readouterr().err
    monkeypatch.setattr(work_folder, "_FAN_IN", most)
    opened, open_at_once = [], []
    monkeypatch.setattr(PartCursor, "close", lambda self, close=PartCursor.close: (opened.pop(), close(self)))

    def watched(self, *arguments, init=PartCursor.__init__):
        opened.append(self)
        open_at_once.append(len(opened))
        init(self, *arguments)

    monkeypatch.setattr(PartCursor, "__init__", watched)
    preprocess([source], tokenizer=hf_tokenizer, output=str(tmp_path / "out"), workers=1)
    assert ("hu combined: 100%" in capsys.readouterr().err) == (most < 1000)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert max(open_at_once) <= most and not opened


@pytest.mark.parametrize("most, when", [(2, 1), (2, 7), (3, 2), (3, 6), (10, 1)])
@pytest.mark.parametrize("what", ["finish", "remove"])
def test_killed_while_parts_are_combined(
    write_text, hf_tokenizer, tmp_path, small_blocks, monkeypatch, most, when, what
):
    path = write_text("a.jsonl", [*TEXTS, b"{"])
    run(path, hf_tokenizer, tmp_path / "whole", workers=1, on_bad_line="skip")
    monkeypatch.setattr(work_folder, "_FAN_IN", most)

    class Killed(BaseException):
        pass

    calls, combine, remove = [], PartWriter.finish, os.remove

    def finish(self, *arguments, **options):
        if options.get("durable"):
            calls.append("finish")
        if what == "finish" and calls.count("finish") == when:
            raise Killed
        return combine(self, *arguments, **options)

    def removing(name):
        if str(name).endswith(".part"):
            calls.append("remove")
        if what == "remove" and calls.count("remove") == 3 * when:
            raise Killed
        remove(name)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PartWriter, "finish", finish)
        patch.setattr(os, "remove", removing)
        run(path, hf_tokenizer, tmp_path / "out", workers=1, on_bad_line="skip")
    assert len(list((tmp_path / "out" / "hu.parts").glob("*.json"))) > 20
    combined = sorted((tmp_path / "out" / "hu.parts").glob("*-*.json"))
    assert combined or what == "finish"
    if when == 7:  # whatever killed the machine damaged a combined part
        path_of_part = combined[0].with_suffix(".part")
        path_of_part.write_bytes(path_of_part.read_bytes()[:-1] + b"\xff")
    run(path, hf_tokenizer, tmp_path / "out", workers=1, on_bad_line="skip")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_few_files_may_be_open(monkeypatch):
    for soft, expected in ((1024, 512), (256, 128), (resource.RLIM_INFINITY, 512), (3, 2)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, soft=soft: (soft, soft))
        assert work_folder.fan_in() == expected
