"""One cluster for all tests of this folder, and jobs of the scripts in examples/slurm on it."""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "examples/slurm"
# Of no speed: waits are as long as a machine that does much else may need.
# two nodes, two ranks and two GPUs (pretended) on each
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")


def _cluster_module():
    spec = importlib.util.spec_from_file_location("slurm_cluster", HERE / "cluster.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator:
    module = _cluster_module()
    if reason := module.why_not():
        pytest.skip(reason)
    try:
        running = module.Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    except (OSError, subprocess.SubprocessError) as error:  # no ports, no munge, a container that forbids it
        pytest.skip(f"Slurm is installed, but does not come up here: {error}")
    yield running
    running.stop()


class Jobs:
    """Submits scripts that find `megatron-lpr` in `programs`, and reads what they print, in `folder`."""

    def __init__(self, cluster, programs: Path, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.scripts = shutil.copytree(SCRIPTS, folder / "the scripts", dirs_exist_ok=True)  # a name with a space
        self.variables = {"PATH": f"{programs}:{cluster.environment['PATH']}", "OMP_NUM_THREADS": "1"}

    def submit(self, script: str, *words: object, options: tuple[str, ...] = (), **variables: str) -> str:
        log = ("--parsable", f"--output={self.folder}/%j.log", f"--chdir={self.folder}")
        return self.cluster.run(
            "sbatch", *log, *SIZE, *options, self.scripts / script, *words, **self.variables | variables
        ).strip()

    def log(self, number: str) -> str:
        file = self.folder / f"{number}.log"
        return file.read_text() if file.exists() else ""

    def wait(self, number: str, state: str = "COMPLETED", *, restarts: int = 0, seconds: float = 600) -> str:
        """What the job printed, once it has ended in this state after so many restarts."""
        found = self.cluster.wait(number, seconds)
        log = self.log(number)
        assert (found, self.cluster.job(number)["Restarts"]) == (state, str(restarts)), log
        return log

    def wait_for(self, number: str, pattern: str, seconds: float = 300) -> None:
        """Until the job has printed something."""
        self.cluster.wait_until(lambda: re.search(pattern, self.log(number)), seconds)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Path:
    """A folder of programs with stand_in.sh as `megatron-lpr`."""
    folder = tmp_path_factory.mktemp("bin")
    shutil.copy(HERE / "stand_in.sh", folder / "megatron-lpr")
    (folder / "megatron-lpr").chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def jobs_of(cluster):
    """jobs_of(programs, folder): jobs on the cluster."""
    return functools.partial(Jobs, cluster)
