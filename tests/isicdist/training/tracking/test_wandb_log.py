"""wandb: what an offline run holds, the environment variables, one run per folder, and never a reason to stop."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

from isicdist.training.tracking import Tracker, resolve_wandb_mode
from isicdist.training.tracking.wandb_log import WandbLog

pytestmark = pytest.mark.usefixtures("without_login")


def test_the_mode_is_offline_without_a_login(monkeypatch):
    assert resolve_wandb_mode()[0] == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert resolve_wandb_mode()[0] == "offline", "online without a login would ask on the terminal"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolve_wandb_mode()[0] == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_wandb_mode()[0] == "disabled"
    monkeypatch.setenv("WANDB_MODE", "")
    assert resolve_wandb_mode()[0] == "online"
    assert "WANDB_MODE" not in os.environ, "wandb refuses an empty one"


def test_a_disabled_wandb_logs_and_prints_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbLog.start(tmp_path, {}, pytest.fail) is None
    assert list(tmp_path.iterdir()) == []


def test_offline_runs_of_one_folder_share_an_id(tmp_path, capsys, train_metrics, scores):
    run = tmp_path / "run"
    for step in (1, 2):
        with Tracker.open(run, {}, main=True, total_steps=10) as tracker:
            tracker.log_train(replace(train_metrics, step=step))
            tracker.log_evaluation(replace(scores, step=step))
        assert "wandb: offline" in capsys.readouterr().out
    identity = (run / "wandb-id").read_text().strip()
    assert {path.name for path in run.glob("wandb/offline-run-*/*.wandb")} == {f"run-{identity}.wandb"}


def rows_of(records: list[Any]) -> list[dict[str, Any]]:
    """The rows of the history, each a dict of its values by name."""
    histories = [record.history for record in records if record.HasField("history")]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in histories]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_an_offline_run_holds_scalars_curves_table_and_pictures(tmp_path, read_wandb, train_metrics, scores, details):
    config = {"world_size": 2, "data_digest": "abc", "optim": {"lr": 0.5}, "mixed_precision": "no"}
    with Tracker.open(tmp_path, config, main=True, total_steps=10) as tracker:
        tracker.log_train(replace(train_metrics, loss_scale=1024.0))
        tracker.log_evaluation(scores, lambda: details)
        tracker.log_evaluation(replace(scores, step=2), lambda: details)
    records = read_wandb(tmp_path)
    (run,) = [record.run for record in records if record.HasField("run")]
    shown = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config.items() <= shown.items()
    assert len(shown["git_commit"]) == 40
    assert (run.project, run.display_name) == ("isicdist", tmp_path.name)

    train, evaluation, later = rows_of(records)
    assert {name: value for name, value in train.items() if not name.startswith("_")} == {
        "step": 1,
        "epoch": 0,
        "samples": 32,
        "train/loss": 0.5,
        "train/pooled_dice": 0.25,
        "train/lr": 1e-3,
        "train/grad_norm": 1.5,
        "train/images_per_s": 17.0,
        "train/images_per_s_per_device": 8.5,
        "train/data_wait": 0.01,
        "train/skipped": 0,
        "train/memory_bytes": 2_000_000_000,
        "train/loss_scale": 1024.0,
    }
    axes = {name: evaluation[name] for name in ("step", "epoch", "samples")}
    assert axes == {"step": 1, "epoch": 2, "samples": 96}
    named = {name: evaluation[f"val/{name}"] for name in ("n", "mean_dice", "thresholded_jaccard", "average_precision")}
    assert named == {"n": 3, "mean_dice": 0.8, "thresholded_jaccard": 0.5, "average_precision": 0.9}
    assert evaluation["val/dice_histogram/values"] == [0, 0, 1, 0, 0, 0, 0, 0, 1, *[0] * 9, 1, 0]

    (files,) = tmp_path.glob("wandb/offline-run-*/files")
    curve = json.loads((files / evaluation["val/threshold_curve_table/path"]).read_bytes())
    assert len(curve["data"]) == 3 * 64
    (table, *_) = [record.artifact.manifest for record in records if "worst_table" in record.artifact.name]
    staged = {entry.path: Path(entry.local_path) for entry in table.contents}
    table = json.loads(staged["val/worst_table.table.json"].read_bytes())
    assert table["columns"] == ["key", "dice", "jaccard", "lesion_area", "picture"]
    ((key, dice, jaccard, area, picture),) = table["data"]
    assert (key, dice, area) == ("ISIC_0000001", 0.1, 1 / 6)
    assert jaccard == pytest.approx(0.1 / 1.9)
    worst = details.grouped()["worst"][0]
    assert np.abs(pixels(staged[picture["path"]]).astype(int) - worst.image).max() <= 3
    assert np.array_equal(pixels(staged[picture["masks"]["prediction"]["path"]]), worst.prediction)
    assert all(path.is_relative_to(tmp_path / "wandb") for path in staged.values())

    assert evaluation["val/fixed_images/captions"] == ["ISIC_0000004  Dice 0.400", "ISIC_0000009  Dice 0.900"]
    assert later["val/fixed_images/captions"] == evaluation["val/fixed_images/captions"]
    assert evaluation["val/worst_images/count"] == 1
    for example, name, masks in zip(
        details.grouped()["fixed"],
        evaluation["val/fixed_images/filenames"],
        evaluation["val/fixed_images/all_masks"],
        strict=True,
    ):
        assert np.abs(pixels(files / name).astype(int) - example.image).max() <= 3
        assert np.array_equal(pixels(files / masks["ground_truth"]["path"]), example.mask)
        assert np.array_equal(pixels(files / masks["prediction"]["path"]), example.prediction)


def test_each_value_has_the_step_axis_and_a_summary(tmp_path, read_wandb, train_metrics, scores):
    with Tracker.open(tmp_path, {}, main=True, total_steps=10) as tracker:
        tracker.log_train(train_metrics)
        tracker.log_evaluation(scores)
    metrics = {r.metric.name: r.metric for r in read_wandb(tmp_path) if r.HasField("metric")}
    assert {"step", "epoch", "samples", "train/loss", "val/mean_dice"} <= metrics.keys()
    assert {metric.step_metric for name, metric in metrics.items() if "/" in name} == {"step"}
    assert (metrics["train/loss"].summary.min, metrics["train/loss"].summary.max) == (True, False)
    assert (metrics["val/mean_dice"].summary.min, metrics["val/mean_dice"].summary.max) == (False, True)


def test_the_best_model_is_an_artifact_on_request(tmp_path, read_wandb):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "best" / "model.json").write_text('{"step": 7, "threshold": 0.25}')
    for log_model in ("none", "best"):
        with Tracker.open(tmp_path, {"log_model": log_model}, main=True, total_steps=10):
            pass
    (artifact,) = [record.artifact for record in read_wandb(tmp_path) if record.HasField("artifact")]
    assert artifact.type == "model"
    assert {"best", "step-7"} <= set(artifact.aliases)
    assert json.loads(artifact.metadata) == {"step": 7, "threshold": 0.25}
    assert [entry.path for entry in artifact.manifest.contents] == ["model.json", "model.safetensors"]


def test_an_evaluation_after_training_joins_the_run(tmp_path, read_wandb, scores, details):
    run = tmp_path / "run"
    with Tracker.join(run) as tracker:  # of a model that was copied away from its run
        tracker.log_evaluation(scores, pytest.fail)
    config = {"tracker": ["wandb"], "seed": 3}
    with Tracker.open(run, config, main=True, total_steps=10):
        pass
    with Tracker.join(run) as tracker:
        tracker.log_evaluation(replace(scores, split="test"), lambda: replace(details, epoch=None, samples=None))
    records = read_wandb(run)
    assert len({record.run.run_id for record in records if record.HasField("run")}) == 1
    (row,) = rows_of(records)
    assert (row["step"], row["test/mean_dice"], "samples" in row) == (1, 0.8, False)


def test_the_names_of_the_environment_are_used(tmp_path, monkeypatch, read_wandb):
    names = {"PROJECT": "lesions", "NAME": "first", "ENTITY": "clinic", "TAGS": "a,b", "RUN_ID": "trial7"}
    for name, value in names.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with Tracker.open(tmp_path, {}, main=True, total_steps=10):
        pass
    (run,) = [record.run for record in read_wandb(tmp_path) if record.HasField("run")]
    assert (run.project, run.display_name, run.entity, list(run.tags)) == ("lesions", "first", "clinic", ["a", "b"])
    assert run.run_id == (tmp_path / "wandb-id").read_text().strip() == "trial7"


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """A server that knows no key."""

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(401)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_wrong_key_logs_offline_and_is_written_nowhere(
    tmp_path, monkeypatch, capfd, read_wandb, train_metrics, refusing_server
):
    secret = "canary" * 8
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_BASE_URL", refusing_server)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with Tracker.open(tmp_path / "run", {}, main=True, total_steps=10) as tracker:
        tracker.log_train(train_metrics)
    printed = capfd.readouterr()
    assert "wandb: offline (online failed: " in printed.out
    assert len(rows_of(read_wandb(tmp_path / "run"))) == 1
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if b"canary" in path.read_bytes()]
    assert "canary" not in printed.out + printed.err


def test_a_key_that_cannot_be_one_is_named_and_logs_offline(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    mode, reason = resolve_wandb_mode()
    assert mode == "offline"
    assert "WANDB_API_KEY" in reason


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_printed_once_and_training_goes_on(tmp_path, capsys, monkeypatch, train_metrics, broken):
    def fail(*args, **kwargs):
        raise wandb.Error("the dashboard\nis down")

    monkeypatch.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
    with Tracker.open(tmp_path, {}, main=True, total_steps=10) as tracker:
        tracker.log_train(train_metrics)
        tracker.log_train(replace(train_metrics, step=2))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    printed = [line for line in capsys.readouterr().out.splitlines() if "the dashboard is down" in line]
    assert len(printed) == 1
