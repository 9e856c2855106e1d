"""What the scripts do when a job is asked to stop, cancelled or preempted: stand_in.sh is in the place of training."""

import re

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def jobs(jobs_of, stand_in, tmp_path):
    return jobs_of(stand_in, tmp_path)


def counts(jobs):
    return {file.name: int(file.read_text()) for file in jobs.folder.glob("count-*")}


def wait_for_ranks(jobs, number):
    """Until all four listen to signals, in whatever order they have started."""
    for rank in range(4):
        jobs.wait_for(number, f"{rank}: train")


LONG = "1000"  # counts for longer than a busy machine takes to reach it
ALL = {f"count-{rank}": 150 for rank in range(4)}


def test_a_preempted_job_saves_in_its_grace_time_and_goes_on(jobs):
    number = jobs.submit("train.sbatch", "recipe.yaml", "--set", "a=b c", COUNT="150")
    wait_for_ranks(jobs, number)
    urgent = jobs.cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"),
        "--wrap=true",
    ).strip()
    log = jobs.wait(number, restarts=1)
    assert jobs.cluster.wait(urgent, 60) == "COMPLETED"
    assert counts(jobs) == ALL
    # all four ranks ended by themselves, and each went on where it was
    first, second = re.split(r"job \d+, start 2", log)
    assert len(re.findall("[0-3]: train recipe.yaml --set a=b c from 0", first)) == 4
    assert len(re.findall("[0-3]: train recipe.yaml --set a=b c from [1-9]", second)) == 4
    assert "Exited with exit code 75" in first and "Killed" not in first and "Terminated" not in first


def test_a_cancelled_job_saves_and_stays_cancelled(jobs):
    number = jobs.submit("train.sbatch", "recipe.yaml", COUNT=LONG)
    wait_for_ranks(jobs, number)
    jobs.cluster.run("scancel", number)
    log = jobs.wait(number, "CANCELLED")
    assert "goes on" not in log and 0 < min(counts(jobs).values()) < int(LONG)


def test_a_rank_that_fails_fails_the_job(jobs):
    number = jobs.submit("train.sbatch", "fail")
    log = jobs.wait(number, "FAILED")
    assert jobs.cluster.job(number)["ExitCode"] == "9:0" and "ended with status 9" in log


def test_there_is_an_end_to_restarts(jobs):
    number = jobs.submit("train.sbatch", "recipe.yaml", MAX_RESTARTS="0", COUNT=LONG)
    wait_for_ranks(jobs, number)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", number)
    log = jobs.wait(number, "FAILED")
    assert jobs.cluster.job(number)["ExitCode"] == "75:0" and "MAX_RESTARTS (0)" in log


def test_a_task_of_a_sweep_is_requeued_alone(jobs):
    (jobs.folder / "sweep.txt").write_text("# learning rates\na=1 b=2\n\na=3\n")
    one_node = ("--array=1-2", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
    words = ("recipe.yaml", "sweep.txt", "out", "--set", "c=4")
    number = jobs.submit("sweep.sbatch", *words, options=one_node, COUNT="150")
    task = f"{number}_2"  # Slurm gives the last of an array the number of the whole
    jobs.cluster.wait_until(lambda: jobs.cluster.job(task).get("JobState") == "RUNNING", 60)
    own = jobs.cluster.job(task)["JobId"]
    jobs.wait_for(own, "train recipe.yaml")
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", task)
    log = jobs.wait(task, restarts=1)
    assert len(re.findall("0: train recipe.yaml --set output=out/2 --set c=4 --set a=3 from", jobs.log(own))) == 2, log
    jobs.wait(f"{number}_1")
