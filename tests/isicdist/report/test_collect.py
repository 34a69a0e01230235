"""Files of a run, read as typed objects: names, old versions, damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from isicdist.errors import CheckpointError
from isicdist.report.collect import Evaluation, RunFiles

COUNTS = {
    "found": 10,
    "packed": 8,
    "rejected": 2,
    "ignored": 0,
    "reasons": {"no_mask": 2},
    "duplicates": {"near": 1},
    "duplicates_across_splits": 0,
}


@pytest.fixture
def evaluation(tmp_path: Path, evaluated_runs: tuple[Path, Path]) -> Path:
    """A copy of an evaluation, to be damaged."""
    return shutil.copytree(evaluated_runs[0] / "evaluation" / "test", tmp_path / "test")


def test_runs_are_named_by_their_folder_and_by_their_path_where_that_is_ambiguous(tmp_path, make_run):
    folders = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run"), make_run(tmp_path / "other")]
    assert [run.name for run in RunFiles.read_all(folders)] == [str(folders[0]), str(folders[1]), "other"]
    assert RunFiles.read_all(folders[:1])[0].name == "run"


def test_the_shard_set_is_what_the_config_records(tmp_path, make_run):
    record = {"splits": {"train": 3, "val": 1}, "counts": COUNTS}
    recorded = RunFiles.read(make_run(tmp_path / "recorded", dataset=record), name="run").dataset
    assert recorded is not None
    assert (recorded.splits, recorded.counts.reasons) == ({"train": 3, "val": 1}, {"no_mask": 2})
    assert RunFiles.read(make_run(tmp_path / "older"), name="run").dataset is None
    damaged = RunFiles.read(make_run(tmp_path / "damaged", dataset={"splits": {}}), name="run")
    with pytest.raises(CheckpointError, match=r"config\.json: missing or damaged; copy the run again"):
        _ = damaged.dataset


def test_the_scores_of_an_image_are_those_of_the_summary(evaluation):
    found = Evaluation.read(evaluation)
    scores, summary = found.per_image, found.summary
    assert summary.at_tuned.original is not None
    assert scores.tuned_dice.mean() == pytest.approx(summary.at_tuned.original.mean_dice)
    assert scores.network_dice.mean() == pytest.approx(summary.at_default.network.mean_dice)
    assert len(scores.keys) == len(scores.lesion_areas) == summary.n
    assert found.thresholds["threshold"].tolist() == (np.arange(256) / 256).tolist()


def test_the_columns_of_version_0_1_are_read(evaluation):
    new = Evaluation.read(evaluation).per_image
    path = evaluation / "per_image.csv"
    path.write_text(path.read_text().replace("tuned_threshold_", "own_threshold_"))
    shutil.rmtree(evaluation / "examples")  # 0.1 wrote no separate pictures
    old = Evaluation.read(evaluation)
    assert old.per_image.tuned_dice.tolist() == new.tuned_dice.tolist()
    assert old.examples == []


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("per_image.csv", "per_image"), ("thresholds.csv", "thresholds"), ("examples/examples.json", "examples")],
)
@pytest.mark.parametrize("content", [None, "", "id,dice\na,b\n"])
def test_a_missing_or_damaged_file_is_named(evaluation, name, attribute, content):
    if content is None:
        (evaluation / name).unlink()
    else:
        (evaluation / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name}: missing or damaged; evaluate the split again"):
        getattr(Evaluation.read(evaluation), attribute)


def test_a_config_without_a_setting_that_the_report_names_is_refused(run):
    (run / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: missing or damaged; copy the run again"):
        RunFiles.read(run, name="run")
    (run / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: missing or damaged; .* \(no 'batch\.global_size'\)"):
        RunFiles.read(run, name="run")


def test_a_damaged_model_json_is_named(run):
    assert RunFiles.read(run, name="run").model is not None
    (run / "best" / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.json: missing or damaged"):
        _ = RunFiles.read(run, name="run").model
