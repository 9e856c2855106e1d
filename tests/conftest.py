"""Fixtures of all tests, and which of them are fast.

`make test-fast` runs the unit tests that need neither Megatron-Core nor processes of their own nor seconds:
`pytest -m fast tests/unit`. What uses Megatron-Core has the mark `megatron`: CI repeats that on the newest version.
`make test-te` runs what needs Transformer Engine, on the emulation in tests/helpers/te_on_cpu.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; tiny tensors gain nothing from threads

import functools
import gc
import sys
from pathlib import Path
from types import CodeType

import pytest
import te_on_cpu

from megatron_lpr.testing.run_distributed import RankProcesses
from megatron_lpr.testing.toy_models import write_toy_model

te_on_cpu.install_on_import()  # where the environment says so, before Megatron-Core is imported

TESTS = Path(__file__).parent
FOLDERS = ("distributed", "e2e", "gpu", "te", "unit/model", "unit/training", "unit/platform")
WITH_MEGATRON = {TESTS / folder for folder in FOLDERS}
SLOW = {TESTS / "unit/conversion"}  # whole models are written and read, small as they are
PROCESSES = {"subprocess", "multiprocessing", "Process", "Popen", "run_distributed", "RankProcesses"}
# of all fast tests together: a minute or so on an idle machine, two on a busy one; CI runs on a slow one that is busy
FAST_CPU_SECONDS = 360
imported_by: list[str] = []  # the first test after which Megatron-Core is imported


def only_fast(config: pytest.Config) -> bool:
    return config.getoption("-m") == "fast"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing the tests of Megatron would import Megatron; and what does not run need not be collected."""
    return True if only_fast(config) and collection_path in WITH_MEGATRON | SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if WITH_MEGATRON & set(item.path.parents) or any(name.startswith("megatron") for name in fixtures):
            item.add_marker("megatron")
        code = getattr(getattr(item, "function", None), "__code__", None)
        if SLOW & set(item.path.parents) or starts_processes(code):
            item.add_marker("slow")
        if not item.get_closest_marker("megatron") and not item.get_closest_marker("slow"):
            item.add_marker("fast")


def starts_processes(code: CodeType | None) -> bool:
    """Whether a test, or a function inside it, names what starts processes."""
    if code is None:
        return False
    return bool(PROCESSES & set(code.co_names)) or any(
        starts_processes(inner) for inner in code.co_consts if isinstance(inner, CodeType)
    )


def pytest_runtest_logfinish(nodeid: str) -> None:
    if "megatron.core" in sys.modules and not imported_by:
        imported_by.append(nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The mark `fast` keeps its word."""
    if not only_fast(session.config):
        return
    seconds = sum(os.times()[:4])
    if imported_by:
        wrong = f"{imported_by[0]} imports Megatron-Core: give it the mark `megatron`"
    elif seconds > FAST_CPU_SECONDS:
        wrong = f"the fast tests took {seconds:.0f} CPU seconds: give the slowest (--durations=20) the mark `slow`"
    else:
        return
    print(f"\n{wrong}", file=sys.stderr)
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def megatron_imported():
    """Whenever Megatron is left, garbage is collected: a third of a second, if all that is imported is looked at."""
    from megatron_lpr.platform import prepare

    prepare()
    import megatron_lpr.training.train  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture
def megatron(megatron_imported):
    """Megatron in this process, a run of one rank. Commands (cli.main) enter and leave by themselves instead."""
    from megatron_lpr.platform import megatron

    with megatron():
        yield


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    """Folder of a random dense model, fp32, untied."""
    return write_toy_model(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="session")
def toy_tied(tmp_path_factory):
    """The same size with tied embeddings."""
    return write_toy_model(tmp_path_factory.mktemp("toy") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def on_ranks():
    """on_ranks(func, world_size, *args): as `run_distributed`, in processes that stay for the next test.

    Importing torch and Megatron costs seconds in each.
    """
    with RankProcesses() as processes:
        yield functools.partial(processes.run, timeout_seconds=900.0)
