"""The whole pipeline once per session, through the command line, on a toy project whose base model is bf16."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_lpr import cli
from megatron_lpr.testing.toy_models import write_toy_project


@dataclass(frozen=True)
class Project:
    """A folder with a base model, corpora, recipes and whatever commands wrote."""

    root: Path
    recipes: dict[str, Path]

    def run(self, command: str, first: object, *arguments: object) -> str:
        """Run a command that must succeed; returns what it printed. first: its recipe, by name, or another argument."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = cli.main([command, *map(str, (self.recipes.get(str(first), first), *arguments))])
        assert status == 0
        return printed.getvalue()


@pytest.fixture(scope="session")
def project(megatron_imported, tmp_path_factory) -> Project:
    """Preprocessed and upcycled."""
    root = tmp_path_factory.mktemp("project")
    project = Project(root, write_toy_project(root, dtype="bfloat16"))
    project.run("preprocess", "upcycle")
    project.run("upcycle", "upcycle")
    return project


@pytest.fixture(scope="session")
def trained(project) -> dict[str, str]:
    """Both stages trained and exported to <root>/hf_stage1 and <root>/hf_stage2; what training printed, by stage."""
    printed = {}
    for stage in ("stage1", "stage2"):
        printed[stage] = project.run("train", stage)
        project.run("export", project.root / stage, project.root / f"hf_{stage}")
    return printed
