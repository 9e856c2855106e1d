"""Training under Slurm on two nodes with two ranks each: whatever happens to a run, it ends in a quiet one's bytes."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_lpr import cli
from megatron_lpr.reporting.metrics_log import read_metrics
from megatron_lpr.testing.equal_runs import differences
from megatron_lpr.testing.toy_models import toy_recipes, write_recipe, write_toy_project

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS, EVERY = 40, 6
SLOW = """
import sys, time
from megatron_lpr.platform import prepare
prepare()
from megatron_lpr.cli import main
from megatron_lpr.training.train import Trainer
step = Trainer.train_step
def slow(trainer):
    time.sleep(0.2)
    return step(trainer)
Trainer.train_step = slow
sys.exit(main())
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A base model, corpora, and stage1.yaml and stage2.yaml, which four ranks can run."""
    root = tmp_path_factory.mktemp("project")
    write_toy_project(root)
    assert cli.main(["preprocess", str(root / "upcycle.yaml")]) == 0
    for name in ("stage1", "stage2"):
        tree = toy_recipes(root)[name]
        tree["model"] = tree["model"] | {"load": None}
        tree["train"] = tree["train"] | {"steps": STEPS, "micro_batch_size": 1}
        write_recipe(root / f"{name}.yaml", tree | {"checkpoint": {"every": EVERY}, "parallel": {"expert": 2}})
    return root


@pytest.fixture(scope="module")
def runs(jobs_of, project):
    """Jobs of the real program, in the project's folder."""
    return jobs_of(Path(sys.executable).parent, project)


@pytest.fixture(scope="module")
def slow_runs(jobs_of, project, tmp_path_factory):
    """The same, with steps that leave time to disturb a run, however fast the machine is."""
    program = tmp_path_factory.mktemp("bin") / "megatron-lpr"
    program.write_text(f"#!{sys.executable}\n{SLOW}")
    program.chmod(0o755)
    return jobs_of(program.parent, project)


@pytest.fixture(scope="module")
def limited(jobs_of, stand_in, tmp_path_factory):
    """Beside the others, a job that counts for longer than its time limit: a minute, at which Slurm looks twice."""
    jobs = jobs_of(stand_in, tmp_path_factory.mktemp("limited"))
    small = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=1", "--signal=B:USR1@20")
    return jobs, jobs.submit("train.sbatch", "recipe.yaml", options=small, COUNT="100000")


@pytest.fixture(scope="module")
def chain(runs, limited):
    """Stage 1, stage 2, export and evaluation, as submit.sh chains them: the folder of the chain, and its jobs."""
    site = {"PARTITION": "test", "NODES": "2", "GPUS_PER_NODE": "2", "CPUS_PER_TASK": "1", "TIME": "60"}
    folder = runs.folder / "chain"
    words = (ROOT / "examples/slurm/submit.sh", "stage1.yaml", "stage2.yaml", folder, "--set", "evaluation.window=16")
    printed = runs.cluster.run(*words, cwd=runs.folder, **site, **runs.variables)
    names = dict(pair.split() for pair in printed.split(";")[0].removeprefix("jobs: ").split(", "))
    for name, number in names.items():
        state = runs.cluster.wait(number, 600)
        assert state == "COMPLETED", (folder / f"logs/{name}-{number}.log").read_text()
    return folder, names


def step(run: Path) -> int:
    """The last step in the metrics of a run."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_the_chain(chain):
    folder, jobs = chain
    assert (folder / "export/config.json").exists()
    assert json.loads((folder / "export.json").read_text())["window"] == 16  # the words of both trainings
    log = (folder / f"logs/stage1-{jobs['stage1']}.log").read_text()
    assert "4 ranks on n[1-2]" in log
    assert re.search(rf"\n0: \S+Z  saved {folder}/stage1/checkpoints/step_{STEPS:08d}\n", log)
    assert len(read_metrics(folder / "stage2/metrics.jsonl")) == STEPS


def test_the_time_limit(limited):
    jobs, number = limited
    jobs.wait_for(number, "start 2, .*\n0: train recipe.yaml from [1-9]")
    jobs.cluster.run("scancel", number)
    assert re.search("start 1, .*\n0: train recipe.yaml from 0\n.*exit code 75\n.*goes on", jobs.log(number))


def starts(run: Path) -> list[int]:
    """The step at which each start of a run began."""
    file = run / "starts.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def test_whatever_happens_to_a_run(chain, slow_runs):
    """A rank dies, the time limit is near, the ranks are told to end, a node is lost: one after the other."""
    runs = slow_runs
    run, cluster = runs.folder / "disturbed", runs.cluster
    words = ("train.sbatch", "stage1.yaml", "--set", f"output={run}")

    def started(count):
        """And has made a step that none before it has made: before that a signal ends the start-up."""
        cluster.wait_until(lambda: len(starts(run)) == count and step(run) > max(furthest, starts(run)[-1]), 300)

    number = runs.submit(*words)
    cluster.wait_until(lambda: step(run) > EVERY, 300)
    kill_rank(number, 3)
    assert "goes on" not in runs.wait(number, "FAILED")

    furthest = step(run)  # this many lines stand in its metrics until it goes on
    number = runs.submit(*words)
    started(2)
    cluster.run("scancel", "--batch", "--signal=USR1", number)  # as the time limit does
    started(3)
    cluster.run("scancel", "--signal=TERM", number)  # the ranks alone
    started(4)
    cluster.lose("n2")
    cluster.wait_until(lambda: cluster.job(number)["Restarts"] == "3", 300)
    cluster.bring_back("n2")
    log = runs.wait(number, restarts=3)

    first, second, third, fourth, fifth = starts(run)
    assert first == 0 and second % EVERY == 0 and second < third < fourth <= fifth, starts(run)
    assert log.count("goes on when Slurm starts it again") == 2 and "Traceback" not in log
    assert not differences(run, chain[0] / "stage1")


def kill_rank(number: str, rank: int) -> None:
    """As the kernel does when memory is short."""
    mine = {"SLURM_JOB_ID": number, "SLURM_PROCID": str(rank)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):  # others come and go
            if process.name() == "megatron-lpr" and mine.items() <= process.environ().items():
                process.send_signal(signal.SIGKILL)
                return
    raise AssertionError(f"no rank {rank} of job {number}")


def test_a_sweep(runs):
    """Two tasks of a rank each; the first has the recipe's own settings, spelled out."""
    (runs.folder / "sweep.txt").write_text("optimizer.lr=1e-2\noptimizer.lr=2e-3 balance.coeff=0.1\n")
    small = ("--set", "parallel.expert=1", "--set", "train.steps=4")
    one_rank = ("--array=1-2", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
    number = runs.submit("sweep.sbatch", "stage1.yaml", "sweep.txt", "sweep", *small, options=one_rank)
    quiet = [Path(sys.executable).with_name("megatron-lpr"), "train", "stage1.yaml", "--set", "output=quiet", *small]
    done = subprocess.run(quiet, cwd=runs.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for task in (1, 2):
        assert runs.cluster.wait(f"{number}_{task}", 600) == "COMPLETED"
    assert not differences(runs.folder / "sweep/1", runs.folder / "quiet")
    assert differences(runs.folder / "sweep/2", runs.folder / "quiet")
