"""Comparison of runs: settings that differ, and the paired difference of mean Dice."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from isicdist.report.collect import RunFiles
from isicdist.report.compare import compare_runs, differing_settings, flat_settings


def test_settings_of_older_versions_have_the_names_of_today():
    assert flat_settings({"max_skipped": 3, "augment": {"small_share": 0.5, "scale": [0.5, 2]}}) == {
        "max_nonfinite_steps": 3,
        "augment.progressive_resize_fraction": 0.5,
        "augment.scale": [0.5, 2],
    }


def test_only_settings_that_differ_are_listed(tmp_path, make_run):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", world_size=3, extra=[1, 2])]
    runs = RunFiles.read_all(folders)
    found = {setting.name: setting.values for setting in differing_settings(runs)}
    assert found == {"world_size": ("2", "3"), "extra": ("–", "1 to 2")}
    assert differing_settings(runs[:1]) == []


def test_the_difference_is_second_minus_first_over_the_same_images(evaluated_runs):
    runs = RunFiles.read_all(evaluated_runs)
    (comparison,) = compare_runs(runs)
    means = []
    for run in runs:
        summary = run.evaluations["test"].summary
        assert summary.at_default.original is not None
        means.append(summary.at_default.original.mean_dice)
    assert comparison.resolution == "original"
    assert comparison.result is not None
    assert comparison.result.difference == pytest.approx(means[1] - means[0])
    low, high = comparison.result.interval_95
    assert low <= comparison.result.difference <= high
    assert compare_runs(runs[:1]) == []


def test_the_order_of_the_images_does_not_matter_but_which_they_are(tmp_path, evaluated_runs):
    first, second = (shutil.copytree(run, tmp_path / run.name) for run in evaluated_runs)
    expected = compare_runs(RunFiles.read_all([first, second]))[0].result
    table = second / "evaluation" / "test" / "per_image.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *reversed(rows)]) + "\n")
    assert compare_runs(RunFiles.read_all([first, second]))[0].result == expected
    table.write_text("\n".join([header, *rows[1:]]) + "\n")
    assert compare_runs(RunFiles.read_all([first, second]))[0].result is None


def change_table(run, change) -> None:
    table = run / "evaluation" / "test" / "per_image.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, **change(row)} for row in rows)


def change_summary(run, **changes) -> None:
    path = run / "evaluation" / "test" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (lambda run: change_table(run, lambda row: {"original_width": 7}), "other masks or photographs"),
        (lambda run: change_table(run, lambda row: {"original_fn": int(row["original_fn"]) + 1}), "other masks"),
        (lambda run: change_summary(run, tta="d4"), "test-time augmentation off and d4"),
        (lambda run: change_summary(run, models=["ab"]), "of an earlier model of <b>second; evaluate it again"),
    ],
)
def test_scores_that_are_not_of_the_same_question_are_not_compared(tmp_path, evaluated_runs, change, obstacle):
    first, second = (shutil.copytree(run, tmp_path / run.name) for run in evaluated_runs)
    change(second)
    (found,) = compare_runs(RunFiles.read_all([first, second]))
    assert found.result is None
    assert obstacle in found.obstacle


def test_images_of_a_group_are_resampled_together_in_a_comparison(tmp_path, evaluated_runs):
    runs = [shutil.copytree(run, tmp_path / run.name) for run in evaluated_runs]
    for run in runs:
        change_table(run, lambda row: {"group": row["id"][:-1]})
    (found,) = compare_runs(RunFiles.read_all(runs))
    assert found.result is not None
    assert 1 <= found.result.groups < found.result.n


def test_network_resolutions_are_compared_on_one_shard_set_only(tmp_path, evaluated_runs):
    first, second = (shutil.copytree(run, tmp_path / run.name) for run in evaluated_runs)
    table = second / "evaluation" / "test" / "per_image.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if "original_d" not in name and "original_j" not in name]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    found = compare_runs(RunFiles.read_all([first, second]))[0]
    assert found.resolution == "network"
    assert found.result is not None
    for name, comparable in (("config.json", True), ("evaluation/test/summary.json", False)):
        record = json.loads((second / name).read_text())
        (second / name).write_text(json.dumps({**record, "data_digest": "0" * 64}))
        assert (compare_runs(RunFiles.read_all([first, second]))[0].result is not None) is comparable
