"""A real Slurm on one host: munged, slurmctld, and a slurmd for each pretended node. Needs root and Debian's packages.

By hand: `python tests/slurm/cluster.py FOLDER` starts one and says which variable makes it yours; Ctrl-C ends it.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron_lpr.testing.run_distributed import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
# only looked at, never opened: Slurm wants character devices
PRETENDED_GPUS = ("/dev/null", "/dev/zero")
# not PREEMPTED and NODE_FAIL, which a job is for a moment before it is requeued
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
# cred_expire: a requeued job would wait for two minutes. config_overrides: nodes of more cores than the host has.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=defer_batch=0,sched_interval=1,batch_sched_delay=0,bf_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=300
KillWait=5
Waittime=0
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=8 Boards=1 SocketsPerBoard=1 \
CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n[1-{nodes}] MaxTime=INFINITE DefaultTime=10 PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str | None:
    """What is missing for a cluster here."""
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"no {missing[0]}: apt-get install slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
    return None if os.geteuid() == 0 else "a cluster of several slurmd needs root"


class Cluster:
    """A running cluster of nodes n1, n2, ...; `environment` is what its programs need."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "log", "run", "spool", "munge"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        self._write_conf()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _write_conf(self) -> None:
        ports = [free_port() for _ in range(1 + self.nodes)]
        conf = CONF.format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            port=ports[0],
            ports=",".join(map(str, ports[1:])),
            nodes=self.nodes,
            gpus=len(PRETENDED_GPUS),
        )
        (self.folder / "slurm.conf").write_text(conf)
        gpus = [f"NodeName=n[1-{self.nodes}] Name=gpu File={device}\n" for device in PRETENDED_GPUS]
        (self.folder / "gres.conf").write_text("".join(gpus))

    def _start(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(os.urandom(1024))
        munge.chmod(0o711)
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        # --force: folders above may be writable for all
        self.run("munged", "--force", *(f"--{option}={munge / name}" for option, name in places.items()))
        conf = str(self.folder / "slurm.conf")
        self.run("slurmctld", "-f", conf, "-c")
        for number in range(1, self.nodes + 1):
            self.run("slurmd", "-f", conf, "-N", f"n{number}")
        self.wait_until(lambda: set(self.run("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, 30)

    def stop(self) -> None:
        """End its jobs, then its daemons."""
        with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
            self.run("scancel", "--user=root")
            self.wait_until(lambda: not self.run("squeue", "-h"), 20)
        files = (*self.folder.glob("run/*.pid"), self.folder / "munge/pid")
        daemons = []
        for file in files:
            with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
                daemons.append(psutil.Process(int(file.read_text())))
                daemons[-1].terminate()
        psutil.wait_procs(daemons, timeout=10)

    def run(self, *words: object, cwd: Path | None = None, **variables: str) -> str:
        """Run a program of Slurm's that must succeed; returns what it printed."""
        done = subprocess.run(
            list(map(str, words)),
            env=self.environment | variables,
            cwd=cwd,
            stdout=subprocess.PIPE,
            timeout=60,
            text=True,
        )
        done.check_returncode()
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", "-o", number)))

    def ask(self, *words: str) -> str:
        """`run` what only asks, once more where a busy slurmctld has closed the connection on it."""
        for _ in range(5):
            with contextlib.suppress(subprocess.CalledProcessError):
                return self.run(*words)
            time.sleep(1)
        return self.run(*words)

    def wait(self, number: str, seconds: float) -> str:
        """The state in which a job ends, as COMPLETED."""
        states: list[str] = []

        def has_ended() -> bool:
            states.append(self.job(number)["JobState"])
            return states[-1] in ENDED

        self.wait_until(has_ended, seconds)
        return states[-1]

    def lose(self, node: str) -> None:
        """A node goes down, with whatever runs on it."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def bring_back(self, node: str) -> None:
        """Take a node into service again; while its jobs are being cleaned up, Slurm refuses that."""

        def is_back() -> bool:
            if not self.ask("sinfo", "-h", "-n", node, "-o", "%T").startswith(("down", "drain")):
                return True
            with contextlib.suppress(subprocess.CalledProcessError):
                self.run("scontrol", "update", f"nodename={node}", "state=resume")
            return False

        self.wait_until(is_back, 60)

    def wait_until(self, is_so, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s; {self.run('squeue', '-a')}")
            time.sleep(0.1)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one, of everything that it writes")
    folder = parser.parse_args(words).folder
    if reason := why_not():
        sys.exit(reason)
    cluster = Cluster(folder.resolve())
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # only now: the daemons would inherit it
    print(f"export SLURM_CONF={cluster.folder}/slurm.conf", flush=True)
    signal.sigwait(signals)
    cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
