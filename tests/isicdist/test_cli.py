"""The command line: quick to answer, plain about mistakes, one switch however it is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
        (("synth", "--out", "x", "--samples", "2.5"), "--samples 2.5: give a whole number"),
        (("train", "--data", "set", "--run", "x", "--batch.micro-size", "1.5"), "--batch.micro-size 1.5: give a whole"),
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


def test_ctrl_c_is_one_line_and_exit_130(monkeypatch, capsys):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("isicdist.report.report", interrupted)
    assert run("report", "somewhere") == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("words", "models"),
    [
        (("--checkpoint", "a"), ["a"]),
        (("--ensemble", "a", "b", "--tta", "d4"), ["a", "b"]),
        (("--ensemble", "a", "--ensemble", "b"), ["a", "b"]),
    ],
)
def test_predict_takes_one_model_or_several(words, models, monkeypatch):
    seen: list[list[Path]] = []
    monkeypatch.setattr("isicdist.predict.predict", lambda models, images, out, **rest: seen.append(models))
    assert run("predict", *words, "--images", "i", "--out", "o") == 0
    assert seen == [[Path(model) for model in models]]


def test_predict_needs_a_model_and_not_two_ways_of_naming_it(capsys):
    for words in ((), ("--checkpoint", "a", "--ensemble", "b", "c")):
        assert run("predict", "--images", "i", "--out", "o", *words) == 2
        assert "give --checkpoint RUN, or --ensemble RUN1 RUN2 ... in its place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "enabled"),
    [
        ((), True),
        (("--augment.enabled",), True),
        (("--augment.enabled", "true"), True),
        (("--augment.enabled", "false"), False),
        (("--augment.enabled=false",), False),
        (("--augment.enabled", "False"), False),
        (("--augment.enabled", "0"), False),
        (("--augment.no-enabled",), False),
    ],
)
def test_a_switch_however_it_is_written(words, enabled, monkeypatch):
    seen: list[TrainConfig] = []
    monkeypatch.setattr("isicdist.train.train", lambda config, data, run: seen.append(config))
    assert run("train", "--data", "set", *words, "--run", "run", "--optim.lr", "0.5") == 0
    assert seen[0].augment.enabled is enabled
    assert seen[0].optim.lr == 0.5


@pytest.mark.parametrize(
    ("words", "tracker"),
    [
        ((), ("wandb",)),
        (("--tracker", "none"), ("none",)),
        (("--tracker", "wandb", "tensorboard", "--seed", "1"), ("wandb", "tensorboard")),
        (("--tracker", "trackio", "--tracker", "wandb"), ("trackio", "wandb")),
    ],
)
def test_several_dashboards_however_they_are_written(words, tracker, monkeypatch):
    seen: list[TrainConfig] = []
    monkeypatch.setattr("isicdist.train.train", lambda config, data, run: seen.append(config))
    assert run("train", "--data", "set", *words, "--run", "run") == 0
    assert seen[0].tracker == tracker
