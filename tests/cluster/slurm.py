"""A SLURM cluster on the hosts of `tests.cluster.hosts`: slurmctld on one, a slurmd on each of the others."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import Host

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
_UNFINISHED = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_CONFIG = """
ClusterName=isicdist
SlurmctldHost={controller.name}({controller.address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort=6817
SlurmdPort=6818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
MailProg=/bin/true
JobRequeue=1
KillWait=20
MpiDefault=none
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Give the reason why SLURM cannot be started; None if it can."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=_PATH)]
    return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge" if missing else None


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A cluster that runs. Commands are those of a user who has logged in on the controller's host."""

    controller: Host
    config: Path

    def command(self, *words: object) -> str:
        """Run a command of SLURM; returns what it prints."""
        return self.controller.run(*words, env=self.environment, timeout=60)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a login."""
        return {"SLURM_CONF": str(self.config)}

    def submit(self, *words: object) -> int:
        """Submit a job with sbatch; returns its number."""
        return int(self.command("sbatch", "--parsable", *words))

    def state(self, job: int) -> str:
        """Give the state of a job, as RUNNING."""
        found = re.search(r"JobState=(\w+)", self.command("scontrol", "show", "job", job))
        assert found
        return found[1]

    def wait(self, job: int, seconds: float) -> str:
        """Wait until a job has ended; returns its state. Raises AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) in _UNFINISHED:
            assert time.monotonic() < end, self.command("scontrol", "show", "job", job)
            time.sleep(0.5)
        return state


@contextlib.contextmanager
def slurm(folder: Path, nodes: list[Host], controller: Host, *, cpus: int = 2) -> Iterator[Slurm]:
    """Start a cluster of these nodes, each with `cpus` CPUs and one GPU that is only counted."""
    folder.mkdir()
    (folder / "state").mkdir()
    config = folder / "slurm.conf"
    lines = [
        f"NodeName={node.name} NodeAddr={node.address} CPUs={cpus} RealMemory=4000 Gres=gpu:1 State=UNKNOWN"
        for node in nodes
    ]
    config.write_text(_CONFIG.format(controller=controller, folder=folder, nodes="\n".join(lines)))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/zero\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"]
    environment = {"SLURM_CONF": str(config)}
    with contextlib.ExitStack() as running:
        # The files are below a folder of pytest, which munged finds too open; --force makes that a warning.
        running.enter_context(controller.running(*munge, output=folder / "munged.log"))
        running.enter_context(
            controller.running("slurmctld", "-D", "-f", config, output=folder / "slurmctld.log", env=environment)
        )
        for node in nodes:
            log = folder / f"slurmd-{node.name}.log"
            running.enter_context(node.running("slurmd", "-D", "-N", node.name, output=log, env=environment))
        cluster = Slurm(controller=controller, config=config)
        _wait_until_idle(cluster, len(nodes), folder)
        yield cluster


def _wait_until_idle(cluster: Slurm, nodes: int, folder: Path) -> None:
    end = time.monotonic() + 60
    while True:
        found = subprocess.run(
            cluster.controller.command("sinfo", "--noheader", "--Node", "--format=%T"),
            env=cluster.controller.environment(cluster.environment), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if found.stdout.split() == ["idle"] * nodes:
            return
        logs = "".join(path.read_text() for path in folder.glob("slurm*.log"))
        assert time.monotonic() < end, found.stdout + found.stderr + logs
        time.sleep(0.5)
