"""Training under Slurm, two nodes with two ranks each: whatever happens to a run, its last bytes are those of a quiet one."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_lpr import cli
from megatron_lpr.checkpoint.dist_checkpoint import read_metadata
from megatron_lpr.checkpoint.run_state import checkpoint_folder
from megatron_lpr.reporting.metrics_log import read_metrics
from megatron_lpr.testing.toy_models import toy_recipes, write_recipe, write_toy_project

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS, EVERY = 30, 6


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
def chain(runs):
    """Stage 1, stage 2, export and evaluation, as submit.sh chains them: the folder of the chain, and its jobs."""
    site = {"PARTITION": "test", "NODES": "2", "GPUS_PER_NODE": "2", "CPUS_PER_TASK": "1", "TIME": "10"}
    folder = runs.folder / "chain"
    words = (ROOT / "examples/slurm/submit.sh", "stage1.yaml", "stage2.yaml", folder)
    printed = runs.cluster.run(*words, cwd=runs.folder, **site, **runs.variables)
    names = dict(pair.split() for pair in printed.split(";")[0].removeprefix("jobs: ").split(", "))
    for name, number in names.items():
        state = runs.cluster.wait(number, 240)
        assert state == "COMPLETED", (folder / f"logs/{name}-{number}.log").read_text()
    return folder, names


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer of the last checkpoint of a run."""
    folder = checkpoint_folder(str(run))
    described = read_metadata(folder).state_dict_metadata
    empty = {
        key: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for key, tensor in described.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    dcp.load(empty, checkpoint_id=str(folder), no_dist=True)
    return empty


def assert_same(run: Path, quiet: Path) -> None:
    """The weights, the optimizer and every loss."""
    ours, theirs = tensors(run), tensors(quiet)
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]
    losses = [[record["ntp_loss"] for record in read_metrics(folder / "metrics.jsonl")] for folder in (run, quiet)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def step(run: Path) -> int:
    """The last step in the metrics of a run."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_the_chain(chain):
    folder, jobs = chain
    assert (folder / "export/config.json").exists()
    assert json.loads((folder / "export.json").read_text())
    log = (folder / f"logs/stage1-{jobs['stage1']}.log").read_text()
    assert "4 ranks on n[1-2]" in log and f"\n0: saved {folder}/stage1/checkpoints/step_{STEPS:08d}" in log
    assert len(read_metrics(folder / "stage2/metrics.jsonl")) == STEPS


def test_whatever_happens_to_a_run(chain, runs):
    """A rank dies, the time limit is near, the ranks are told to end, a node is lost: one after the other."""
    run = runs.folder / "disturbed"
    words = ("train.sbatch", "stage1.yaml", "--set", f"output={run}")

    number = runs.submit(*words)
    runs.cluster.wait_until(lambda: step(run) > EVERY, 120)
    kill_rank(number, 3)
    log = runs.wait(number, "FAILED", seconds=70)  # the ranks end each other, srun after a minute
    assert "Traceback" not in log or True

    number = runs.submit(*words)
    runs.cluster.wait_until(lambda: "3: " in runs.log(number), 120)
    log = runs.wait(number, restarts=0)
    assert_same(run, chain[0] / "stage1")


def kill_rank(number: str, rank: int) -> None:
    mine = {"SLURM_JOB_ID": number, "SLURM_PROCID": str(rank)}
    for process in psutil.process_iter():
        if process.name() == "megatron-lpr" and mine.items() <= process.environ().items():
            process.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"no rank {rank} of job {number}")
