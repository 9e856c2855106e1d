"""Paths of a recipe that look as if a shell would read them."""

from pathlib import Path

import pytest

from megatron_lpr.checkpoint.run_state import locate
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.text.text_files import expand
from megatron_lpr.data.text.tokenizer_file import tokenizer_file
from megatron_lpr.errors import UserError
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.files.unexpanded import refuse_unexpanded
from megatron_lpr.recipe.checks import check_preprocessing
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe


def preprocess(base):
    corpora = [{"name": "hu", "language": "hu", "role": "expanded", "files": ["hu.txt"]}]
    tree = {"name": "n", "output": "o", "model": {"base": base}, "preprocess": {"output": "d", "corpora": corpora}}
    check_preprocessing(from_tree(Recipe, tree, where="test"))


READERS = {
    "model.base": read_config,
    "model.base, for its tokenizer": preprocess,
    "preprocess.tokenizer": lambda path: tokenizer_file(Path(path)),
    "model.load": locate,
    "data.manifest": Manifest.load,
    "files": lambda path: expand([path]),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_not_there_by_that_name_is_told_why(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'~/a': ~ is the home folder for a shell"):
        read("~/a")
    for path in ("$SCRATCH/a", "s3://bucket/a"):
        with pytest.raises(UserError, match="neither variables of a shell nor addresses are read here"):
            read(path)
    with pytest.raises(UserError, match="no such|no file|no manifest|does not exist"):
        read("a")


def test_a_folder_of_that_very_name_may_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~/a").mkdir(parents=True)
    refuse_unexpanded("~/a")
