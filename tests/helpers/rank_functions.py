"""What the tests of run_distributed run on a rank; importable without torch."""

import os
import time


def describe_rank(argument):
    environment = os.environ
    return {
        "argument": argument,
        "process": os.getpid(),
        "rank": int(environment["RANK"]),
        "world_size": int(environment["WORLD_SIZE"]),
        "port": environment["MASTER_PORT"],
        "threads": environment["OMP_NUM_THREADS"],
    }


def fail_on(rank):
    if int(os.environ["RANK"]) == rank:
        raise ValueError("on purpose")
    time.sleep(300)


def vanish_on(rank):
    if int(os.environ["RANK"]) == rank:
        os._exit(3)


def hang_on(rank):
    if int(os.environ["RANK"]) == rank:
        time.sleep(300)
