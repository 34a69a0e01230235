"""Hosts of a cluster on one machine: each a network namespace with a name, an address and a home of its own.

Every host has its own /etc/hosts, in which its name is 127.0.1.1, as Debian and Ubuntu write it; the other hosts' names
are their addresses. Files are shared, as on a cluster with a network file system, but for the home and so the caches.
Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NETWORK = "10.87.65"
_BRIDGE, _PROBE = "isicbr0", "isicprobe0"


def why_not() -> str | None:
    """Give the reason why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "no `ip`: apt-get install iproute2"
    bridge = ["ip", "link", "add", _PROBE, "type", "bridge"]
    tried = subprocess.run(bridge, capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip("link", "del", _PROBE)
    return None


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host."""

    name: str
    """Host name, and name of its network namespace."""
    address: str
    home: Path
    """Its HOME, which no other host shares."""

    def command(self, *words: object) -> list[str]:
        """Prefix a command so that it runs on this host."""
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name)
        return ["ip", "netns", "exec", self.name, *named, *(str(word) for word in words)]

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """Give the environment of a login on this host."""
        inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
        path = f"{BIN}:{inherited.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}"
        mine = {"HOME": str(self.home), "PATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        return {**inherited, **mine, "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1", **(env or {})}

    def start(self, *words: object, output: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command on this host, in the folder of the project; stdout and stderr are appended to `output`."""
        with output.open("ab") as file:
            return subprocess.Popen(self.command(*words), cwd=ROOT, env=self.environment(env), stdout=file, stderr=file)

    @contextlib.contextmanager
    def running(
        self, *words: object, output: Path, env: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a server on this host inside the block."""
        process = self.start(*words, output=output, env=env)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def run(self, *words: object, env: Mapping[str, str] | None = None, timeout: float = 120) -> str:
        """Run a command on this host to its end; returns stdout. Raises AssertionError with stderr where it fails."""
        done = subprocess.run(
            self.command(*words), cwd=ROOT, env=self.environment(env), capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def cut_off(self) -> None:
        """Pull the network cable."""
        _ip("link", "set", f"{self.name}-br", "down")

    def connect(self) -> None:
        """Plug the network cable in again."""
        _ip("link", "set", f"{self.name}-br", "up")

    def slow_down(self, megabits_per_s: int) -> None:
        """Limit the rate at which this host sends."""
        shaped = ("tbf", "rate", f"{megabits_per_s}mbit", "burst", "128kb", "latency", "200ms")
        _ip("netns", "exec", self.name, "tc", "qdisc", "replace", "dev", "eth0", "root", *shaped)

    def kill_all(self) -> None:
        """Kill every process of this host."""
        _kill_all(self.name)


@contextlib.contextmanager
def hosts(folder: Path, *names: str) -> Iterator[list[Host]]:
    """Make hosts of these names on one bridge; at the end their processes are killed, and nothing of them remains."""
    _remove(names)
    made = [
        Host(name=name, address=f"{NETWORK}.{number}", home=folder / "homes" / name)
        for number, name in enumerate(names, start=1)
    ]
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("link", "set", _BRIDGE, "up")
        for host in made:
            _add(host, made)
        yield made
    finally:
        _remove(names)


def _add(host: Host, all_hosts: list[Host]) -> None:
    host.home.mkdir(parents=True, exist_ok=True)
    etc = Path("/etc/netns") / host.name  # `ip netns exec` binds it over /etc
    etc.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}"]
    lines += [f"{other.address} {other.name}" for other in all_hosts if other != host]
    (etc / "hosts").write_text("\n".join(lines) + "\n")
    outside = f"{host.name}-br"
    _ip("netns", "add", host.name)
    _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", host.name)
    _ip("link", "set", outside, "master", _BRIDGE, "up")
    _ip("-n", host.name, "link", "set", "lo", "up")
    _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.name, "link", "set", "eth0", "up")


def _remove(names: tuple[str, ...]) -> None:
    for name in names:
        _kill_all(name)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{name}-br"], capture_output=True, check=False)
        shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
    subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True, check=False)


def _kill_all(name: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


def wait_for_port(host: Host, url: str, seconds: float = 30) -> None:
    """Wait until a server answers requests of `host`."""
    program = (
        "import sys, time, urllib.error, urllib.request\n"
        "while True:\n"
        "    try:\n"
        "        urllib.request.urlopen(sys.argv[1]).read(); break\n"
        "    except urllib.error.HTTPError: break\n"
        "    except OSError: time.sleep(0.1)\n"
    )
    host.run("python", "-c", program, url, timeout=seconds)


def wait_for(text: str, output: Path, seconds: float = 120) -> str:
    """Wait until `output` contains `text`; returns all of it. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not output.exists() or text not in (found := output.read_text(errors="replace")):
        assert time.monotonic() < end, output.read_text(errors="replace") if output.exists() else f"no {output}"
        time.sleep(0.1)
    return found
