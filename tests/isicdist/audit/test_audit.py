"""`isicdist audit`: every pair predicted by a model that has not seen it, a table, a page, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from isicdist.audit import audit, find
from isicdist.audit.held_out import Sample
from isicdist.audit.page import render_page
from isicdist.cli import main
from isicdist.config import Fold
from isicdist.data.folds import open_fold
from isicdist.errors import CheckpointError
from isicdist.network.segmenter import load_model
from shards.errors import UsageError
from shards.exclusions import read_excluded
from shards.progress import no_report
from shards.reader import ShardSet
from tests.isicdist.test_ensemble import save_fold


@pytest.fixture
def runs(tmp_path: Path, shard_set: Path) -> Path:
    for fold in Fold(number=1, count=2).all:
        save_fold(tmp_path / "runs", shard_set, fold)
    return tmp_path / "runs"


def test_every_pair_is_ranked_by_a_model_that_has_not_seen_it(runs, shard_set, tmp_path, capsys):
    out = tmp_path / "audit"
    with pytest.raises(SystemExit) as ended:
        main(["audit", "--data", str(shard_set), "--run", str(runs), "--out", str(out)])
    assert ended.value.code == 0
    assert f"pairs ranked in {out / 'audit.csv'}" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["audit.csv", "audit.html", "summary.json"]
    shards = ShardSet.open(shard_set)
    with (out / "audit.csv").open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    keys = {
        shards.split(name).key(index): name for name in shards.index.splits for index in range(len(shards.split(name)))
    }
    assert {key: row["split"] for key, row in rows.items()} == {
        key: "test" if name == "test" else "train+val" for key, name in keys.items()
    }
    scores = [float(row["score"]) for row in rows.values()]
    assert scores == sorted(scores, reverse=True)
    record = json.loads((out / "summary.json").read_text())
    assert record["images"] == len(keys)
    assert record["data_digest"] == shards.digest

    fold = Fold(number=2, count=2)
    split, model = open_fold(shards, fold)[1], load_model(runs / "fold-2")
    image = torch.from_numpy(split.image(0)).permute(2, 0, 1)[None]
    prediction, mask = model(image)[0, 0].numpy() > 0.5, split.mask(0) > 0
    dice = 2 * (prediction & mask).sum() / (prediction.sum() + mask.sum())
    assert float(rows[split.key(0)]["dice"]) == pytest.approx(dice, abs=0.01)  # the probabilities have 8 bits

    with pytest.raises(UsageError, match="excludes no image"):
        read_excluded(out / "audit.csv")
    with pytest.raises(UsageError, match="holds an audit, maybe with verdicts; give another --out"):
        audit(str(shard_set), runs, out)


def test_the_page_shows_the_worst_first_and_escapes_what_it_is_given(shard_set, tmp_path):
    shards = ShardSet.open(shard_set)
    split = shards.split("train")
    samples = [
        Sample(split=split, index=index, split_name="<b>train</b>", levels=split.mask(index) * np.uint8(250))
        for index in range(len(split))
    ]
    samples[3].levels[:] = 250 - samples[3].levels
    findings = find(samples, shards, no_report)
    assert (findings[0].key, findings[0].reason) == (split.key(3), "inverted")
    page = render_page(findings, samples, shards)
    assert page.index(f'data-key="{split.key(3)}"') == page.index("data-key=")
    assert "<b>train" not in page
    assert page.count("<article") == sum(finding.score > 0 for finding in findings)


def test_models_that_may_have_seen_the_images_are_refused(runs, shard_set, tmp_path):
    with pytest.raises(CheckpointError, match="fold-1: not the folder of a cross-validation"):
        audit(str(shard_set), runs / "fold-1", tmp_path / "out")
    card = runs / "fold-2" / "best" / "model.json"
    changed = {**json.loads(card.read_text()), "data_digest": "0" * 64}
    card.write_text(json.dumps({name: value for name, value in changed.items() if name != "checksum"}))
    with pytest.raises(CheckpointError, match="fold-2 was trained on another set than"):
        audit(str(shard_set), runs, tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        audit(str(shard_set), tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_scipy_the_command_says_what_to_install(runs, shard_set, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"the audit needs scipy: pip install 'isicdist\[audit\]'"):
        audit(str(shard_set), runs, tmp_path / "out")
