"""Train and evaluate on two hosts that reach each other over a network, and lose it."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from isicdist.distributed.scaling_model import allreduce_seconds
from tests.cluster.hosts import Host, wait_for, wait_for_port

pytestmark = pytest.mark.cluster
WORDS = ("--batch.global-size", 6, "--model.base-channels", 4, "--log-every", 1, "--checkpoint-every", 1, "--keep", 99)
RENDEZVOUS = {"static": (), "c10d": ("--rdzv_backend", "c10d")}


def launch(
    machines: list[Host], outputs: list[Path], *words: object, rendezvous: str = "static"
) -> list[subprocess.Popen[bytes]]:
    """Start the same command on every host with launch/multinode.yaml, as launch/README.md says."""
    command = ("accelerate", "launch", "--config_file", "launch/multinode.yaml", "--num_machines", len(machines))
    command += ("--num_processes", len(machines), "--main_process_ip", machines[0].name, "--mixed_precision", "no")
    return [
        host.start(*command, "--machine_rank", rank, *RENDEZVOUS[rendezvous], "-m", "isicdist", *words, output=output)
        for rank, (host, output) in enumerate(zip(machines, outputs, strict=True))
    ]


def finish(processes: list[subprocess.Popen[bytes]], outputs: list[Path], timeout: float = 120) -> None:
    codes = [process.wait(timeout) for process in processes]
    assert codes == [0] * len(processes), [output.read_text() for output in outputs]


def scores(run: Path) -> str:
    return (run / "evaluation" / "val" / "per_image.csv").read_text()


def losses(run: Path) -> dict[int, float]:
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {event["step"]: event["loss"] for event in events if event["event"] == "train"}


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_run_on_two_hosts_scores_as_one_process_does(cluster, shard_set, tmp_path, rendezvous):
    machines, run, outputs = cluster[:2], tmp_path / "run", [tmp_path / "alpha.log", tmp_path / "beta.log"]
    words = ("train", "--data", shard_set, "--run", run, "--steps", 3, *WORDS)
    finish(launch(machines, outputs, *words, rendezvous=rendezvous), outputs)
    assert list(losses(run)) == [1, 2, 3]

    score = ("evaluate", "--data", shard_set, "--checkpoint", run, "--split", "val")
    finish(launch(machines, outputs, *score, rendezvous=rendezvous), outputs)
    on_two = scores(run)
    shutil.rmtree(run / "evaluation")
    machines[0].run("isicdist", *score)
    assert on_two == scores(run)


def test_a_host_that_is_cut_off_is_named_and_a_relaunch_resumes(cluster, shard_set, tmp_path):
    machines, run, outputs = cluster[:2], tmp_path / "run", [tmp_path / "alpha.log", tmp_path / "beta.log"]
    words = ("train", "--data", shard_set, "--run", run, "--timeout", 8, "--steps", 200, *WORDS)
    processes = launch(machines, outputs, *words)
    wait_for("step 3/", outputs[0])
    start = time.monotonic()
    machines[1].cut_off()
    text = wait_for("another rank", outputs[0], 30)
    assert re.search(r"error: rank 0: another rank \(1 on beta\) has gone or does not answer", text), text
    assert time.monotonic() - start < 8 + 5 + 5  # the timeout, the reports to the store, and a margin
    for host in machines:
        host.kill_all()
    for process in processes:
        process.wait(30)
    machines[1].connect()

    done = max(losses(run))
    assert 3 <= done < 200
    finish(launch(machines, outputs, *words), outputs)
    assert losses(run).keys() == set(range(1, 201))


def test_each_host_fetches_each_shard_once(cluster, shard_set, tmp_path):
    *machines, files = cluster
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if not nginx:
        pytest.skip("no nginx: apt-get install nginx-light")
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/nginx.pid; error_log stderr; user root; events {{}}\n"
        f"http {{ log_format mine '$remote_addr $uri'; access_log {tmp_path}/access.log mine;\n"
        f"server {{ listen 8080; location / {{ root {shard_set}; }} }} }}\n"
    )
    outputs, url = [tmp_path / "alpha.log", tmp_path / "beta.log"], f"http://{files.name}:8080"
    words = ("train", "--data", url, "--run", tmp_path / "run", "--epochs", 2, *WORDS)
    server = (nginx, "-p", tmp_path, "-c", tmp_path / "nginx.conf")
    with files.running(*server, output=tmp_path / "nginx.log"):
        wait_for_port(machines[0], f"{url}/index.json")
        finish(launch(machines, outputs, *words), outputs)
    fetched = Counter(line for line in (tmp_path / "access.log").read_text().splitlines() if line.endswith(".tar"))
    shards = {path.relative_to(shard_set).as_posix() for path in shard_set.rglob("*.tar") if "test" not in path.parts}
    assert fetched == {f"{host.address} /{shard}": 1 for host in machines for shard in shards}


@pytest.mark.parametrize("megabits_per_s", [50, 200])  # faster links wait for the cores that the hosts share here
def test_the_model_of_the_all_reduce_fits_a_slow_link(cluster, tmp_path, megabits_per_s):
    """The rate that `tc` sets gives, by the scaling model, the time that the doctor measures."""
    machines, outputs = cluster[:2], [tmp_path / "alpha.json", tmp_path / "beta.json"]
    for host in machines:
        host.slow_down(megabits_per_s)
    finish(launch(machines, outputs, "doctor", "--json"), outputs)
    printed = outputs[0].read_text()
    checks = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])["checks"]
    (link,) = [check["numbers"] for check in checks if check["name"] == "all-reduce"]
    expected = allreduce_seconds(int(link["bytes"]), 2, megabits_per_s * 1e6 / 8, link["latency_s"])
    print(f"{megabits_per_s} Mbit/s: {link['seconds']:.3f} s measured, {expected:.3f} s by the model")
    assert link["seconds"] == pytest.approx(expected, rel=0.3)


def test_the_model_of_a_step_fits_training_over_a_slow_link(cluster, shard_set, tmp_path):
    """Steps on two and three hosts take the time of one host and that of the all-reduce, which is most of it."""
    seconds: dict[int, float] = {}
    megabits_per_s = 5
    bandwidth = megabits_per_s * 1e6 / 8
    for host in cluster:
        host.slow_down(megabits_per_s)
    for count in (1, 2, 3):
        run, outputs = tmp_path / f"run{count}", [tmp_path / f"{count}-{host.name}.log" for host in cluster[:count]]
        finish(
            launch(cluster[:count], outputs, "train", "--data", shard_set, "--run", run, "--steps", 10, *WORDS), outputs
        )
        events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        rates = [event["images_per_s"] for event in events if event["event"] == "train"]
        seconds[count] = 6 / statistics.median(rates)
    weights = load_file(next((tmp_path / "run1").rglob("model.safetensors")))
    gradient_bytes = 4 * sum(tensor.numel() for tensor in weights.values())
    for count in (2, 3):
        expected = seconds[1] / count + allreduce_seconds(gradient_bytes, count, bandwidth, 1e-4)
        print(f"{count} hosts: {seconds[count]:.3f} s a step measured, {expected:.3f} s by the model")
        assert seconds[count] == pytest.approx(expected, rel=0.3)
