"""Recipes of examples/ name their base by a path from the root of the repository."""

from pathlib import Path

import pytest


@pytest.fixture
def root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
