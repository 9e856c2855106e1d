"""Runs that are stopped, lose a rank or hang: exit statuses, what is told and what is left, and what resumes."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_lpr.reporting.metrics_log import read_metrics
from megatron_lpr.testing.equal_runs import differences
from megatron_lpr.testing.run_distributed import free_port

STEPS = 12
HELD = Path(__file__).parents[1] / "helpers/train_held.py"
LIMITS = ("cluster.watchdog=1", "cluster.watchdog_floor_seconds=8")


def train(project, output, *assignments, ranks=1, held_at=None):
    """A run of stage 1, as one process for each rank; step `held_at` + 1 waits for a signal (-1: the start-up)."""
    settings = [f"output={output}", f"train.steps={STEPS}", "parallel.distributed_optimizer=true", *assignments]
    program = ["-m", "megatron_lpr.cli", "train"] if held_at is None else [HELD, str(held_at), output / "never"]
    command = [sys.executable, *program, str(project.recipes["stage1"])]
    command += [word for assignment in settings for word in ("--set", assignment)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]


def read_until(process, pattern):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError("".join(lines))


def ends(processes, seconds=120):
    """Exit statuses, and what was printed last by each."""
    deadline = time.monotonic() + seconds
    printed = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes]
    return [process.returncode for process in processes], printed


@pytest.fixture(scope="module")
def outcomes(project, tmp_path_factory):
    """Per case: (exit statuses, what each rank printed, the output folder). All runs go at once, of many more steps."""
    root = tmp_path_factory.mktemp("stopping")
    long = ("train.steps=100000", "checkpoint.every=100000")
    cases = {
        "start-up": (2, "starts from", (), ((1, signal.SIGUSR1),)),
        "one rank is asked": (2, r"step +2/", (), ((1, signal.SIGTERM),)),
        "killed": (2, r"step +2/", (), ((1, signal.SIGKILL),)),
        "stopped process": (2, r"step +6/", LIMITS, ((1, signal.SIGSTOP),)),
        "second signal": (1, r"step +2/", (), ((0, signal.SIGINT), (0, signal.SIGINT))),
        "killed after a save": (1, "saved", ("checkpoint.every=1",), ((0, signal.SIGKILL),)),
        "time": (1, None, ("train.max_minutes=0.001",), ()),
    }
    with ExitStack() as stack:
        runs = {}
        for name, (ranks, _, settings, _) in cases.items():
            held_at = -1 if name == "start-up" else None
            runs[name] = train(project, root / name, *long, *settings, ranks=ranks, held_at=held_at)
            for process in runs[name]:
                stack.enter_context(process)
                stack.callback(process.kill)
        for name, (_, word, _, signals) in cases.items():
            if word:
                read_until(runs[name][0], word)
            for number, (rank, signum) in enumerate(signals):
                time.sleep(0.5 * number)
                runs[name][rank].send_signal(signum)
        found = {}
        for name in cases:
            waited = runs[name][:1] if name == "stopped process" else runs[name]
            found[name] = (*ends(waited), root / name)
    return found


def test_one_rank_is_asked_and_all_save_and_stop(outcomes):
    status, printed, output = outcomes["one rank is asked"]
    assert status == [75, 75]
    [step] = [record["step"] for record in read_metrics(output / "metrics.jsonl")][-1:]
    sentence = f"stopped by SIGTERM on rank 1 after step {step} of 100,000, which is saved; the same command goes on"
    assert sentence in printed[0] and "Traceback" not in printed[0] + printed[1]
    assert (output / "stopped").read_text().startswith(sentence)
    assert (output / f"checkpoints/step_{step:08d}/run.json").exists()


def test_a_killed_rank(outcomes):
    status, printed, _ = outcomes["killed"]
    assert status == [1, -9]
    assert printed[0].rstrip().endswith("has died without a word, as by SIGKILL or for want of memory")
    assert "Traceback" not in printed[0]


def test_nothing_is_left_of_a_killed_run(outcomes):
    """Nothing holds what it printed to, or `train | tee log` would not end; nothing goes on."""
    status, _, output = outcomes["killed after a save"]
    assert status == [-9]
    mine = str(output).encode()
    assert not [process for process in Path("/proc").glob("[0-9]*") if mine in command_line(process)]


def command_line(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


def test_a_rank_that_does_nothing_more(outcomes):
    status, printed, output = outcomes["stopped process"]
    assert status == [1]
    assert "no answer from rank 1 (process " in printed[0] and printed[0].rstrip().endswith("or its machine is gone")
    [folder] = (output / "stacks").iterdir()
    # where in the step it waits for rank 1 differs
    assert "megatron_lpr/training/train.py" in (folder / "rank_00000.txt").read_text()
    assert (folder / "batch.txt").read_text().startswith(f"step {int(folder.name[5:])}: samples ")


def test_in_the_start_up_there_is_nothing_to_save(outcomes):
    status, printed, output = outcomes["start-up"]
    assert status == [75, 75] and "Traceback" not in printed[0] + printed[1]
    assert "stopped by SIGUSR1 before its first step, so that there is nothing to save" in printed[0] + printed[1]
    assert not (output / "checkpoints").exists()


def test_a_second_signal(outcomes):
    status, printed, output = outcomes["second signal"]
    if status == [75]:  # it was quicker
        assert "stopped by SIGINT after step" in printed[0]
    else:
        assert status == [130] and printed[0].rstrip().endswith("ended at once by a second signal, SIGINT")


def test_the_time_is_over(outcomes):
    status, printed, _ = outcomes["time"]
    assert status == [75] and "stopped by train.max_minutes (0.001) after step 1 of 100,000" in printed[0]


def test_what_goes_on_ends_with_the_same_bytes(project, tmp_path):
    [process] = train(project, tmp_path / "stopped", held_at=STEPS - 4)
    with process:
        read_until(process, r"step +2/")
        process.send_signal(signal.SIGTERM)
        status, _ = ends([process])
        assert status == [75]
    settings = [f"output={tmp_path / 'stopped'}", f"train.steps={STEPS}"]
    project.run("train", "stage1", *(word for s in settings for word in ("--set", s)))
    settings[0] = f"output={tmp_path / 'undisturbed'}"
    project.run("train", "stage1", *(word for s in settings for word in ("--set", s)))
    assert not (tmp_path / "stopped/stopped").exists()
    assert not differences(tmp_path / "stopped", tmp_path / "undisturbed")
