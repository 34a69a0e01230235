"""The demo: its commands, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from isicdist import cli as isicdist_cli
from isicdist.demo import MARKER, demo, demo_commands
from shards import cli as shards_cli
from shards.errors import ToolkitError, UsageError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the demo has started, none of which runs; `report` fails with exit code 3."""
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3 if "report" in command else 0)

    monkeypatch.setattr("isicdist.demo.subprocess.run", run)
    return commands


def test_a_failing_command_stops_the_demo_and_is_named(tmp_path, started):
    with pytest.raises(ToolkitError, match="the demo stopped at 'The run': exit code 3"):
        demo(tmp_path / "demo", 8)
    assert started == list(demo_commands(tmp_path / "demo", 8).values())


def test_only_an_earlier_demo_is_replaced(tmp_path, started, monkeypatch):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty and not of an earlier demo"):
        demo(tmp_path, 8)
    assert started == []
    assert (tmp_path / "thesis.tex").exists()
    (tmp_path / MARKER).touch()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path, Path()):
        with pytest.raises(ToolkitError):
            demo(out, 8)
        assert [path.name for path in tmp_path.iterdir()] == [MARKER]


@pytest.mark.parametrize(("gpus", "processes"), [(0, 2), (1, 1), (4, 2)])
def test_training_starts_as_many_processes_as_the_machine_has_devices_for(monkeypatch, gpus, processes):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    command = demo_commands(Path("demo"), 8)["Training"]
    assert command[command.index("--num_processes") + 1] == str(processes)
    assert ("--multi_gpu" in command) == (processes > 1)


def test_the_commands_parse_and_use_no_file_of_a_checkout():
    for command in demo_commands(Path("demo"), 8).values():
        assert command[:2] == [sys.executable, "-m"]
        package = max(index for index, word in enumerate(command) if word in ("isicdist", "shards"))
        app = isicdist_cli.app if command[package] == "isicdist" else shards_cli.app
        app.parse_args(command[package + 1 :], exit_on_error=False, print_error=False)
        paths = [word for word in command[1:] if "/" in word]
        assert all(path.startswith("demo/") for path in paths)
