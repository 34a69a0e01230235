"""From a saved model to masks, scores and pictures."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from isicdist import load_model
from isicdist import predict as predict_module
from isicdist.config import ModelConfig, TrainConfig, Tta
from isicdist.distributed import launch
from isicdist.errors import CheckpointError
from isicdist.network.best import ModelMetadata, ValidationScore, load_best, save_best
from isicdist.network.normalise import normalise, to_unit
from isicdist.outputs import Outputs
from isicdist.predict import PredictionCounts, predict
from isicdist.train import build_model
from shards.errors import SourceError, UsageError
from shards.reader import ShardSet

CONFIG = TrainConfig(seed=1, model=ModelConfig(base_channels=2))
BATCH = 8


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Batches of eight images of 64 pixels."""
    monkeypatch.setattr(predict_module, "BATCH_PIXELS", BATCH * 64**2)


def metadata_of(shard_set: Path) -> ModelMetadata:
    score = ValidationScore(mean_dice=0.5)
    return ModelMetadata.of(CONFIG.model, ShardSet.open(shard_set), step=7, score=score)


@pytest.fixture
def run(tmp_path: Path, shard_set: Path) -> Path:
    """A run whose best model is as it was initialised."""
    save_best(tmp_path / "run", build_model(CONFIG), metadata_of(shard_set))
    return tmp_path / "run"


@pytest.fixture
def images(tmp_path: Path, archive: tuple[Path, Path]) -> Path:
    """A folder of ten images of several sizes: more than one batch."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(archive[0].glob("*.jpg"))[: BATCH + 2]:
        shutil.copy(path, folder)
    assert len({pixels(path).shape for path in folder.iterdir()}) > 3
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def masks(out: Path) -> dict[str, np.ndarray]:
    return {path.name: pixels(path) for path in out.glob("*.png")}


def test_a_mask_for_each_image_at_its_own_resolution(run, images, tmp_path):
    out = tmp_path / "out"
    done = predict([run], str(images), out)
    assert done == PredictionCounts(masks=10, rejected=0)
    found = masks(out)
    assert sorted(path.name for path in out.iterdir()) == [*sorted(found), "predict.json"]  # and nothing else
    assert set(found) == {f"{path.stem}_segmentation.png" for path in images.iterdir()}
    for path in images.iterdir():
        mask = found[f"{path.stem}_segmentation.png"]
        assert mask.shape == pixels(path).shape[:2]
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}


def test_a_mask_is_what_the_network_says(run, images, tmp_path):
    predict([run], str(images), tmp_path / "out")
    model, metadata = load_best(run)
    path = sorted(images.iterdir())[-1]  # in the second batch
    picture = Image.fromarray(pixels(path))
    small = np.array(picture.resize((64, 64), Image.Resampling.BILINEAR))
    with torch.inference_mode():
        probs = model(normalise(to_unit(torch.from_numpy(small)[None].permute(0, 3, 1, 2)))).sigmoid()[0, 0]
    expected = np.asarray(Image.fromarray(probs.numpy()).resize(picture.size, Image.Resampling.BILINEAR))
    mask = masks(tmp_path / "out")[f"{path.stem}_segmentation.png"]
    assert 0.02 < mask.mean() / 255 < 0.98  # neither side is trivial
    assert ((mask > 0) == (expected > metadata.threshold)).mean() > 0.999


def test_an_archive_gives_the_same_masks(run, images, tmp_path):
    packed = tmp_path / "images.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in images.iterdir():
            archive.write(path, f"ISIC/{path.name}")
        archive.writestr("ISIC/LICENSE.txt", "CC0")
    predict([run], str(images), tmp_path / "one")
    predict([run / "best"], str(packed), tmp_path / "two")
    one, two = masks(tmp_path / "one"), masks(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_an_image_that_cannot_be_read_is_listed_and_the_others_are_done(run, images, tmp_path):
    out = tmp_path / "out"
    names = sorted(path.name for path in images.iterdir())
    bad = [names[1], names[9]]
    (images / bad[0]).write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    (images / bad[1]).write_bytes((images / names[2]).read_bytes()[:900])
    done = predict([run], str(images), out)
    assert done == PredictionCounts(masks=8, rejected=2)
    assert len(masks(out)) == 8
    with (out / "rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == bad
    assert all(row["reason"] in ("unreadable", "truncated") and row["detail"] for row in rows)

    for name in bad:  # mended: the list of the first time is gone
        shutil.copy(images / names[2], images / name)
    assert predict([run], str(images), out) == PredictionCounts(masks=2, reused=8)
    assert len(masks(out)) == 10
    assert not (out / "rejected.csv").exists()


def test_nothing_to_predict_and_two_of_one_name_are_refused(run, images, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty"):
        predict([run], str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(SourceError, match="none"):
        predict([run], str(tmp_path / "none"), tmp_path / "out")
    (tmp_path / "empty" / "scan.tif").write_bytes(b"II*")
    with pytest.raises(SourceError, match=r"no .jpg, .png or .bmp image in it \(but 1 of a type that is not read\)"):
        predict([run], str(tmp_path / "empty"), tmp_path / "out")
    first = sorted(images.iterdir())[0]
    shutil.copy(first, first.with_suffix(".jpeg"))
    with pytest.raises(SourceError, match="would have one mask; rename one of them") as caught:
        predict([run], str(images), tmp_path / "out")
    assert first.name in str(caught.value)
    with pytest.raises(CheckpointError, match="no best model yet"):
        predict([images], str(images), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_file_and_urls_give_the_same_masks(run, images, tmp_path):
    predict([run], str(images), tmp_path / "folder")
    path = sorted(images.iterdir())[3]
    one = f"{path.stem}_segmentation.png"
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/photographs/{each.name}": each.read_bytes() for each in images.iterdir()})
    try:
        for place in (str(path), f"memory://photographs/{path.name}"):
            out = tmp_path / place.rpartition(":")[0]
            assert predict([run], place, out) == PredictionCounts(masks=1)
            assert list(masks(out)) == [one]
            assert (masks(out)[one] != masks(tmp_path / "folder")[one]).mean() < 1e-3  # a batch of another size
        assert predict([run], "memory://photographs", tmp_path / "url") == PredictionCounts(masks=10)
    finally:
        memory.rm("/photographs", recursive=True)
    for name, mask in masks(tmp_path / "folder").items():
        assert np.array_equal(masks(tmp_path / "url")[name], mask)


def test_a_mask_that_is_there_is_kept_until_its_image_changes(run, images, tmp_path):
    out = tmp_path / "out"
    predict([run], str(images), out)
    whole = masks(out)
    paths = sorted(out.glob("*.png"))
    paths[2].unlink()
    paths[5].write_bytes(b"kept as it is")
    (out / ".ISIC_segmentation.png.999999999.new").write_bytes(b"torn")
    assert predict([run], str(images), out) == PredictionCounts(masks=1, reused=9)
    assert (pixels(paths[2]) != whole[paths[2].name]).mean() < 1e-3  # a batch of another size may round otherwise
    assert paths[5].read_bytes() == b"kept as it is"
    assert sorted(path.name for path in out.iterdir()) == [*sorted(whole), "predict.json"]

    changed = sorted(images.iterdir())[5]
    os.utime(changed, ns=(0, paths[5].stat().st_mtime_ns + 10**9))
    assert predict([run], str(images), out) == PredictionCounts(masks=1, reused=9)
    assert (pixels(paths[5]) != whole[paths[5].name]).mean() < 1e-3
    assert predict([run], str(images), out, overlay=True) == PredictionCounts(masks=10)
    assert len(list((out / "overlays").iterdir())) == 10


def test_masks_made_otherwise_are_never_replaced(run, images, shard_set, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    mine = out / f"{sorted(images.iterdir())[4].stem}_segmentation.png"
    mine.write_bytes(b"drawn by hand")
    with pytest.raises(UsageError, match="there already, and not of a prediction; give another --out") as caught:
        predict([run], str(images), out)
    assert str(mine) in str(caught.value)
    assert [path.read_bytes() for path in out.iterdir()] == [b"drawn by hand"]
    mine.unlink()

    predict([run], str(images), out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    other = TrainConfig(seed=2, model=ModelConfig(base_channels=2))
    save_best(tmp_path / "other", build_model(other), metadata_of(shard_set))
    (tmp_path / "more").mkdir()
    shutil.copy(sorted(images.iterdir())[0], tmp_path / "more")
    cases: list[tuple[list[Path], Path, Tta, str]] = [
        ([tmp_path / "other"], images, "off", "models"),
        ([run, tmp_path / "other"], images, "off", "models"),
        ([run], tmp_path / "more", "off", "images"),
        ([run], images, "d4", "tta off, not d4"),
    ]
    for models, source, tta, said in cases:
        with pytest.raises(UsageError, match=f"made with {said}.*; give another --out$"):
            predict(models, str(source), out, tta=tta)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    for damaged in ("{", "[]", "{}"):
        (out / "predict.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"predict.json: not what a prediction writes"):
            predict([run], str(images), out)


def test_probabilities_and_mask_say_the_same(run, images, tmp_path):
    card = json.loads((run / "best" / "model.json").read_text())
    del card["checksum"]  # changed by hand
    (run / "best" / "model.json").write_text(json.dumps({**card, "threshold": 113 / 256}))
    out = tmp_path / "out"
    predict([run], str(images), out, probabilities=True, tta="flips")
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".png") == ["predict.json", "probabilities"]
    for path in images.iterdir():
        values = pixels(out / "probabilities" / f"{path.stem}.png")
        mask = pixels(out / f"{path.stem}_segmentation.png")
        assert values.dtype == np.uint8
        assert len(np.unique(values)) > 20
        assert np.array_equal(mask, np.where(values >= 113, 255, 0))


def test_an_overlay_is_the_image_with_the_rim_of_its_mask(run, images, tmp_path):
    predict([run], str(images), tmp_path / "out", overlay=True)
    for path in images.iterdir():
        overlay = pixels(tmp_path / "out" / "overlays" / f"{path.stem}.jpg").astype(int)
        image, mask = pixels(path).astype(int), pixels(tmp_path / "out" / f"{path.stem}_segmentation.png") > 0
        assert overlay.shape == image.shape
        changed = np.abs(overlay - image).max(axis=2) > 60
        assert changed.any()
        near = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 3), (7, 7))  # beyond the edge is no lesion
        rim = near.any(axis=(2, 3)) & ~near.all(axis=(2, 3))
        assert (changed & ~rim).mean() < 0.002


def test_an_ensemble_averages_at_the_original_resolution(images, shard_set, tmp_path):
    runs = []
    for seed, size, fit, threshold in ((1, 64, "stretch", 0.5), (2, 96, "crop", 0.25), (3, 64, "stretch", 0.75)):
        config = TrainConfig(seed=seed, model=ModelConfig(base_channels=2))
        metadata = dataclasses.replace(metadata_of(shard_set), size=size, fit=fit, threshold=threshold)
        runs.append(tmp_path / f"run{seed}")
        save_best(runs[-1], build_model(config), metadata)
    predict(runs, str(images), tmp_path / "out", tta="d4")
    for path in images.iterdir():
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        total, shown = np.zeros((2, picture.height, picture.width))
        for run in runs:
            model = load_model(run)
            plan = model.resize_plan(picture.height, picture.width)
            batch = torch.tensor(plan.resize_image(picture)).permute(2, 0, 1)[None]
            total += plan.restore(model(batch, "d4")[0, 0].numpy())
            left, top, right, bottom = plan.source
            shown[top:bottom, left:right] += 1
        assert set(np.unique(shown)) == {2, 3}  # what the crop leaves out is the others'
        mask = pixels(tmp_path / "out" / f"{path.stem}_segmentation.png") > 0
        assert (mask == (total / shown > 0.5)).mean() > 0.999
    record = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert len(set(record["models"])) == 3
    assert (record["threshold"], record["tta"]) == (0.5, "d4")


def test_a_model_beside_itself_changes_nothing(run, images, tmp_path):
    predict([run], str(images), tmp_path / "one")
    predict([run, shutil.copytree(run, tmp_path / "copy")], str(images), tmp_path / "two")
    one, two = masks(tmp_path / "one"), masks(tmp_path / "two")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_pictures_of_any_kind_have_masks_as_they_are_seen(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=turned)
    picture.convert("CMYK").save(folder / "cmyk.jpeg")
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("RGBA").save(folder / "clear.png")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("1").save(folder / "one.png")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save(folder / "deep.png")
    picture.save(folder / "plain.bmp")
    picture.resize((16, 300)).save(folder / "thin.png")
    assert predict([run], str(folder), tmp_path / "out", overlay=True) == PredictionCounts(masks=9)
    shapes = {name.removesuffix("_segmentation.png"): mask.shape for name, mask in masks(tmp_path / "out").items()}
    assert shapes.pop("turned") == (60, 40)
    assert shapes.pop("thin") == (300, 16)
    assert set(shapes.values()) == {(40, 60)}


def test_small_and_unread_pictures_have_a_row(run, images, tmp_path):
    Image.new("RGB", (200, 15)).save(images / "flat.png")
    (images / "scan.tiff").write_bytes(b"II*")
    (images / "ISIC_0000000_superpixels.png").write_bytes(b"not asked for")
    (images / "skin_segmentation.jpg").write_bytes(b"a mask by its name")
    (images / "LICENSE.txt").write_text("CC0")
    out = tmp_path / "out"
    ignored = ("ISIC_0000000_superpixels.png", "LICENSE.txt", "skin_segmentation.jpg")
    assert predict([run], str(images), out) == PredictionCounts(masks=10, rejected=2, ignored=ignored)
    assert (out / "rejected.csv").read_text().splitlines()[1:] == [
        "flat.png,too-small,200 × 15 pixels; at least 16 × 16 are needed",
        "scan.tiff,unsupported,.tiff is not read; convert it to PNG or JPEG",
    ]
    with pytest.raises(SourceError, match=r"none of its 1 images can be used; .*rejected.csv says why"):
        predict([run], str(images / "flat.png"), tmp_path / "flat")


def test_masks_may_lie_beside_their_images(run, images):
    for out in (images / "masks", images):
        for reused in (0, 10):
            done = predict([run], str(images), out, probabilities=True, overlay=True)
            assert done == PredictionCounts(masks=10 - reused, reused=reused)
        shutil.rmtree(images / "masks", ignore_errors=True)
    done = predict([run], str(images), images.parent / "elsewhere", tta="flips")
    assert done is not None
    assert done.masks == 10
    with pytest.raises(UsageError, match=r"made with tta off, not flips; give another --out$"):
        predict([run], str(images), images, tta="flips")


def test_each_of_two_processes_takes_its_own_images(run, images, tmp_path, python):
    """On a terminal that shows ASCII, with names that are not UTF-8."""
    torn, ignored = (images / os.fsdecode(name) for name in (b"t\xf6rn.jpg", b"h\xe4nd_segmentation.jpg"))
    torn.write_bytes(b"\xff\xd8\xff")
    ignored.write_bytes(b"a mask by its name")
    (images / "LICENSE.txt").write_text("CC0")
    copy = shutil.copytree(run, tmp_path / "copy")
    words = ("predict", "--ensemble", run, copy, "--images", images, "--out", tmp_path / "out", "--tta", "flips")
    done = python("-m", "isicdist", *words, processes=2, env={"PYTHONIOENCODING": "ascii", "TERM": "dumb"})
    assert done.returncode == 0, done.stderr
    assert f"10 masks written to {tmp_path / 'out'}\n" in done.stdout
    assert "1 images could not be used" in done.stderr
    assert (
        r"2 ignored, as their names are those of masks, superpixels or no images, such as h\udce4nd_seg" in done.stderr
    )
    assert r"t\udcf6rn.jpg,unreadable" in (tmp_path / "out" / "rejected.csv").read_text()
    predict([run], str(images), tmp_path / "one", tta="flips")
    one, two = masks(tmp_path / "one"), masks(tmp_path / "out")
    assert one.keys() == two.keys()
    assert max((one[name] != two[name]).mean() for name in one) < 1e-3
    assert predict([run, copy], str(images), tmp_path / "out", tta="flips") == PredictionCounts(
        masks=0, reused=10, rejected=1, ignored=("LICENSE.txt", ignored.name)
    )


def test_a_folder_of_what_is_ignored_says_so(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a_superpixels.png").touch()
    (folder / "skin_Segmentation.jpg").touch()
    with pytest.raises(SourceError, match=r"no .jpg, .png or .bmp image in it \(but 2 ignored, .*skin_Segmentation"):
        predict([run], str(folder), tmp_path / "out")


class RankOfTwo:
    """One of two ranks, whose collectives are those of a process on its own."""

    num_processes = 2
    is_main_process = True

    def __init__(self, rank: int) -> None:
        self.process_index = rank
        self._alone = launch.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._alone, name)


def test_what_an_earlier_prediction_has_left_is_shared_out_evenly(run, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    predict([run], str(images), out)
    expected = masks(out)
    missing = sorted(out.glob("*.png"))[::2]  # by its position in the folder all would be those of rank 0
    for path in missing:
        path.unlink()
    ranks = RankOfTwo(0), RankOfTwo(1)
    for rank, share in zip(ranks * 2, (3, 1, 1, 0), strict=True):  # of the 5 that are missing, then of 2, 1 and none
        monkeypatch.setattr(launch, "start", lambda *_, rank=rank, **__: rank)
        done = predict([run], str(images), out)
        assert done is not None
        assert done.masks == share
    assert masks(out).keys() == expected.keys()


def test_all_threads_decode_ahead_of_a_small_batch_and_memory_is_bounded(run, images, tmp_path, monkeypatch):
    """At 512 pixels a batch has two images on a CPU, and every thread has work all the same."""
    threads = 4
    for number in range(50):
        shutil.copy(sorted(images.iterdir())[number % 10], images / f"copy{number}.jpg")
    monkeypatch.setattr(launch, "worker_threads", lambda: threads)
    monkeypatch.setattr(predict_module, "BATCH_PIXELS", 2 * 64**2)
    together, prepare, write = threading.Barrier(threads), predict_module._prepare, Outputs.write
    events: list[int] = []

    def prepare_together(*args: Any) -> Any:
        together.wait(timeout=20)  # breaks where fewer threads decode than there are
        events.append(1)
        return prepare(*args)

    def write_slowly(*args: Any) -> None:
        time.sleep(0.005)
        write(*args)
        events.append(-1)

    monkeypatch.setattr(predict_module, "_prepare", prepare_together)
    monkeypatch.setattr(Outputs, "write", write_slowly)
    assert predict([run], str(images), tmp_path / "out") == PredictionCounts(masks=60)
    assert len(events) == 120
    assert max(np.cumsum(events)) <= 2 * (2 + 2 * threads) + 2


def test_a_killed_prediction_goes_on_where_it_was(run, images, tmp_path):
    for number in range(60):
        shutil.copy(sorted(images.iterdir())[number % 10], images / f"copy{number}.jpg")
    out = tmp_path / "out"
    script = (
        "import isicdist.predict as p, pathlib, sys\n"
        "p.BATCH_PIXELS = 64 ** 2\n"
        f"p.predict([pathlib.Path({str(run)!r})], {str(images)!r}, pathlib.Path({str(out)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and len(list(out.glob("*.png"))) < 3:
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    there = masks(out)  # each of them whole
    done = predict([run], str(images), out)
    assert done is not None
    assert (done.reused, done.masks + done.reused) == (len(there), 70)
    assert 3 <= done.reused < 70
    assert sorted(path.name for path in out.iterdir()) == [*sorted(masks(out)), "predict.json"]
