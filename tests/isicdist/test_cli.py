"""The command line: quick to answer, plain about mistakes, one switch however it is written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from isicdist import cli
from isicdist.config import TrainConfig


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return int(ended.value.code or 0)


@pytest.mark.parametrize("words", [("isicdist", "--help"), ("isicdist", "train", "--help"), ("shards", "--help")])
def test_help_imports_no_torch(words):
    script = (
        "import runpy, sys\n"
        f"sys.argv = {list(words)!r}\n"
        "try:\n"
        f"    runpy.run_module({words[0]!r}, run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'accelerate', 'webdataset', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        "    print('imported:', sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "imported: []"
    assert "Usage" in done.stdout


def test_train_explains_every_setting(capsys):
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    for flag in ("--batch.global-size", "--optim.lr", "--augment.enabled", "--stream.workers", "--seed", "--keep"):
        assert flag in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian",), "trian"),
        (("report",), "run"),
        (("train", "--data", "set"), "--run"),
        (("synth", "--out", "x", "--samples", "many"), "many"),
        (("predict", "--checkpoint", "a", "--images", "b", "--out", "c", "--threshold", "1"), "--threshold"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, said, capsys):
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_debug_shows_the_traceback_of_a_failure(tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert run("report", nowhere) == 1
    plain = capsys.readouterr().err
    assert plain == f"error: {nowhere}: not a run (no metrics.jsonl); give the folder that train --run wrote\n"
    for words in (("--debug", "report", nowhere), ("report", nowhere, "--debug")):
        assert run(*words) == 1
        shown = capsys.readouterr().err
        assert "Traceback (most recent call last)" in shown
        assert "CheckpointError" in shown
        assert shown.endswith(plain)


@pytest.mark.parametrize(
    ("words", "enabled"),
    [
        ((), True),
        (("--augment.enabled",), True),
        (("--augment.enabled", "true"), True),
        (("--augment.enabled", "false"), False),
        (("--augment.enabled=false",), False),
        (("--augment.no-enabled",), False),
    ],
)
def test_a_switch_however_it_is_written(words, enabled, monkeypatch):
    seen: list[TrainConfig] = []
    monkeypatch.setattr("isicdist.train.train", lambda config, data, run: seen.append(config))
    assert run("train", "--data", "set", *words, "--run", "run", "--optim.lr", "0.5") == 0
    assert seen[0].augment.enabled is enabled
    assert seen[0].optim.lr == 0.5
