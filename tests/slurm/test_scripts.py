"""The scripts of examples/slurm are clean for shellcheck and sbatch, and the chain is what submit.sh says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples/slurm").iterdir())
BATCH = [script for script in SCRIPTS if script.suffix == ".sbatch"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck: apt-get install shellcheck")
@pytest.mark.parametrize("script", [*SCRIPTS, Path(__file__).with_name("stand_in.sh")], ids=lambda path: path.name)
def test_shellcheck(script):
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_slurm_takes_it(cluster, script):
    """With what a node here has; with its own eight GPUs a node it is refused, so that the test can fail."""
    small = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=10")
    cluster.run("sbatch", "--test-only", *small, script, "recipe.yaml")
    if script.name != "command.sbatch":
        with pytest.raises(subprocess.CalledProcessError):
            cluster.run("sbatch", "--test-only", script, "recipe.yaml")


def test_who_asks_a_cluster_for_help_starts_none(tmp_path):
    script = Path(__file__).with_name("cluster.py")
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "usage: cluster.py" in done.stdout and not list(tmp_path.iterdir())


def test_slurm_would_take_the_chain(cluster, tmp_path):
    site = {"PARTITION": "test", "NODES": "2", "GPUS_PER_NODE": "2", "CPUS_PER_TASK": "1", "TIME": "10"}
    words = (ROOT / "examples/slurm/submit.sh", "--test-only", "stage1.yaml", "stage2.yaml", tmp_path / "run")
    cluster.run(*words, **site)
    assert not re.search(str(tmp_path), cluster.run("squeue", "--format=%o"))
    with pytest.raises(subprocess.CalledProcessError):
        cluster.run(*words, **site | {"GPUS_PER_NODE": "8"})


def test_an_export_that_is_there_is_kept_and_the_user_told(tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/jobs\nwc -l < {tmp_path}/jobs\n')
    sbatch.chmod(0o755)
    words = ["bash", ROOT / "examples/slurm/submit.sh", "stage1.yaml", "stage2.yaml", tmp_path / "run"]
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    told = []
    for _ in range(2):
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
        told.append((done.stdout.split(";")[0], done.stderr))
        (tmp_path / "run/export").mkdir(exist_ok=True)
    kept = f"{tmp_path}/run/export is there already and stays as it is: delete it first if stage 2 is to go further\n"
    assert told == [
        ("jobs: stage1 1, stage2 2, export 3, evaluate 4", ""),
        ("jobs: stage1 5, stage2 6, export kept, evaluate 7", kept),
    ]


@pytest.mark.parametrize("lines", ["", "# optimizer.lr=1\n", "optimizer.lr=1\n"])
def test_a_sweep_without_that_line(tmp_path, lines):
    (tmp_path / "lines.txt").write_text(lines)
    words = ["bash", ROOT / "examples/slurm/sweep.sbatch", "recipe.yaml", tmp_path / "lines.txt", tmp_path]
    variables = {"SLURM_ARRAY_TASK_ID": "2", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, env=variables, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "lines.txt has no line 2; give --array as many tasks as it has lines" in done.stderr


def test_restarts_that_are_no_number():
    variables = {"MAX_RESTARTS": "ten", "PATH": "/usr/bin:/bin"}
    words = ["bash", ROOT / "examples/slurm/train.sbatch", "recipe.yaml"]
    done = subprocess.run(words, env=variables, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "train.sbatch: MAX_RESTARTS: 'ten' is no number of restarts\n")


@pytest.mark.parametrize(
    "image, words",
    [
        ("lpr.sqsh", "--container-image=lpr.sqsh --container-mounts={0}:{0},/data:/data --container-workdir={0}"),
        ("lpr.sif", "apptainer exec --nv --pwd {0} --bind {0} --bind /data lpr.sif"),
    ],
)
def test_words_of_a_container(tmp_path, image, words):
    script = f'set -euo pipefail; source {ROOT}/examples/slurm/container.sh; echo "${{container[@]}}"'
    variables = {"CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": "/data", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout.strip() == words.format(tmp_path)
