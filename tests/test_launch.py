"""The launch files say what they do: accelerate reads them, two CPU processes are two, USR1 is passed on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

LAUNCH = Path(__file__).parents[1] / "launch"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]

# Says who it is; with an argument it waits for USR1, leaves the marker of a stopped run, and ends with 85.
WORKER = """
import os, pathlib, signal, sys, time
import torch
from accelerate import Accelerator

stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
accelerator = Accelerator(cpu=True)
total = accelerator.reduce(torch.tensor(accelerator.process_index + 1)).item()
print(f"rank {accelerator.process_index} of {accelerator.num_processes}, WORLD_SIZE {os.environ['WORLD_SIZE']},"
      f" {accelerator.device.type}, {accelerator.mixed_precision}, sum {total}\\n", end="", flush=True)
code = 0
if len(sys.argv) > 1:
    run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
    (run / f"ready-{accelerator.process_index}").touch()
    deadline = time.monotonic() + 60
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.02)
    if stopped:
        (run / "REQUEUE").touch()
        code = 85
accelerator.end_training()
sys.exit(code)
"""
TWO_RANKS = [f"rank {rank} of 2, WORLD_SIZE 2, cpu, bf16, sum 3" for rank in (0, 1)]


def clean_environment() -> dict[str, str]:
    """The environment without what a launcher above this test left in it."""
    launchers = ("ACCELERATE_", "TORCHELASTIC_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if not name.startswith(launchers)}


@pytest.mark.parametrize(
    ("name", "machines", "processes", "kind"),
    [
        ("cpu2", 1, 2, "MULTI_GPU"),
        ("gpu1", 1, 1, "NO"),
        ("gpu8", 1, 8, "MULTI_GPU"),
        ("multinode", 2, 16, "MULTI_GPU"),
    ],
)
def test_accelerate_reads_every_file(name, machines, processes, kind):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.distributed_type == kind
    assert config.mixed_precision == "bf16"
    assert config.use_cpu == (name == "cpu2")


def test_every_file_is_tested_and_in_the_readme():
    readme = (LAUNCH / "README.md").read_text()
    names = {path.name for path in LAUNCH.iterdir()} - {"README.md"}
    assert names == {
        *("cpu2.yaml", "gpu1.yaml", "gpu8.yaml", "multinode.yaml"),  # above
        *("slurm.sbatch", "slurm-shards.sbatch"),  # below, and in tests/cluster with a real SLURM
        *("kubernetes.yaml", "skypilot.yaml", "Dockerfile"),  # checked by schema or lint only
    }
    assert all(f"`{name}`" in readme for name in names)


def test_the_file_for_kubernetes_follows_the_published_schema():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    for resource in (service, job):
        assert kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True) >= "1.31"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    assert int(given["MACHINES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert given["GPUS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]


@pytest.mark.parametrize("name", ["kubernetes.yaml", "skypilot.yaml"])
def test_the_command_of_a_cluster_starts_every_process_of_every_machine(name, tmp_path):
    """Run the command of the file in a shell, with an `accelerate` that prints its arguments."""
    document = list(yaml.safe_load_all((LAUNCH / name).read_text()))[-1]
    if name == "kubernetes.yaml":
        command = document["spec"]["template"]["spec"]["containers"][0]["args"][0]
        given = {"MACHINES": "3", "GPUS": "4", "JOB_COMPLETION_INDEX": "2"}
    else:
        command = document["run"]
        given = {"SKYPILOT_NUM_NODES": "3", "SKYPILOT_NUM_GPUS_PER_NODE": "4", "SKYPILOT_NODE_RANK": "2", "DATA": "set"}
        given["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2\n10.0.0.3"
    (tmp_path / "accelerate").write_text('#!/bin/sh\nprintf "%s " "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **given}
    printed = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=True).stdout
    assert "--num_machines 3 --num_processes 12 --machine_rank 2 " in printed
    assert f"--main_process_ip {'isicdist-0.isicdist' if name == 'kubernetes.yaml' else '10.0.0.1'} " in printed
    assert "-m isicdist train --data " in printed


@pytest.mark.parametrize(
    ("checker", "files"), [("shellcheck", "*.sbatch"), ("hadolint", "Dockerfile")], ids=["shellcheck", "hadolint"]
)
def test_scripts_and_the_image_pass_their_linters(checker, files):
    program = shutil.which(checker, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip(f"no {checker}")
    done = subprocess.run([program, *LAUNCH.glob(files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cpu2_starts_two_processes(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    done = subprocess.run(
        [*ACCELERATE, "launch", "--config_file", str(LAUNCH / "cpu2.yaml"), str(worker)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert sorted(done.stdout.splitlines()) == TWO_RANKS, done.stderr
    assert done.returncode == 0


@pytest.mark.slow
def test_torchrun_starts_a_run_whose_flags_it_leaves_alone(tmp_path):
    words = ("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    flags = ("--data", str(tmp_path / "nope"), "--run", str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "-m", "--", "isicdist", "train", *flags],
        env={**clean_environment(), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    for rank in (0, 1):
        assert f"error: rank {rank}: {tmp_path / 'nope'}: there is no such folder" in done.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment with one machine's `srun` and a `scontrol` that only says what it was asked."""
    tools = {
        "srun": 'shift; export SLURM_NODEID=0; echo $$ > "$TASK"; exec "$@"',  # shift: --kill-on-bad-exit
        "scontrol": 'if [[ $1 == show ]]; then printf "localhost\\nnode9\\n"; else echo "scontrol $*"; fi',
    }
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, script in tools.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (bin_folder / name).chmod(0o755)
    return {
        **clean_environment(),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "TASK": str(tmp_path / "task"),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "localhost,node9",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }


def accelerate_is(cluster: dict[str, str], script: str) -> None:
    """Put this script in the place of the `accelerate` command."""
    path = Path(cluster["TASK"]).parent / "bin" / "accelerate"
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def test_slurm_passes_the_machines_and_every_flag(cluster, tmp_path):
    accelerate_is(cluster, 'echo "$*"; exit 3')
    run = tmp_path / "a run"
    run.mkdir()
    (run / "REQUEUE").touch()  # of an earlier start
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), str(run), "--data", "a folder"],
        env={**cluster, "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.splitlines() == [
        "launch --config_file launch/multinode.yaml --num_machines 2 --num_processes 8 --machine_rank 0"
        f" --main_process_ip localhost --main_process_port 24567 -m isicdist train --run {run} --data a folder"
    ]
    assert done.returncode == 3, "a run that failed is not queued again"


@pytest.mark.skipif(not shutil.which("pkill"), reason="no pkill, which SLURM's nodes have (Debian's package procps)")
def test_slurm_hands_usr1_on_and_queues_the_run_again(cluster, tmp_path):
    """The real launcher and two real processes; only the task is signalled, as SLURM does with cgroups."""
    accelerate_is(cluster, f'exec {" ".join(ACCELERATE)} "$@"')
    project = tmp_path / "project"
    (project / "isicdist").mkdir(parents=True)
    (project / "isicdist" / "__init__.py").touch()
    (project / "isicdist" / "__main__.py").write_text(WORKER)
    (project / "launch").symlink_to(LAUNCH)
    run = tmp_path / "run"
    run.mkdir()
    with subprocess.Popen(
        ["bash", "launch/slurm.sbatch", str(run), "--data", "DIR"],
        cwd=project,
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            while job.poll() is None and len(list(run.glob("ready-*"))) < 2:
                time.sleep(0.05)
            if job.poll() is None:
                os.kill(int(Path(cluster["TASK"]).read_text()), signal.SIGUSR1)
            stdout, stderr = job.communicate(timeout=60)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    *ranks, last = stdout.splitlines()
    assert sorted(ranks) == TWO_RANKS, stderr
    assert last == "scontrol requeue 1234567"
    assert job.returncode == 0


def test_slurm_without_a_run_says_how_to_use_it(cluster):
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch")], env=cluster, capture_output=True, text=True, timeout=30
    )
    assert done.returncode != 0
    assert "usage: sbatch launch/slurm.sbatch RUN" in done.stderr
