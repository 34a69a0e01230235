"""The made-up archive: its layout, its determinism, and that a killed run leaves nothing that looks whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isicdist.data import synthetic
from isicdist.data.synthetic import photograph, synthesize
from shards.errors import UsageError

SMALL = (96, 128)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_and_modes_are_those_of_the_archives(tmp_path):
    seen = []

    def report(done: int, total: int, title: str = "") -> None:
        seen.append((done, total))

    images, truth = synthesize(tmp_path / "out", 4, size=SMALL, report=report)
    keys = [f"ISIC_900000{number}" for number in range(4)]
    notices = ["ATTRIBUTION.txt", "LICENSE.txt"]
    assert images == tmp_path / "out" / "ISIC2018_Task1-2_Training_Input"
    assert truth == tmp_path / "out" / "ISIC2018_Task1_Training_GroundTruth"
    expected = [*notices, *(f"{key}.jpg" for key in keys), *(f"{key}_superpixels.png" for key in keys[:3])]
    assert sorted(path.name for path in images.iterdir()) == sorted(expected)
    assert sorted(path.name for path in truth.iterdir()) == sorted(
        [*notices, *(f"{key}_segmentation.png" for key in keys)]
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for key in keys:
        with Image.open(images / f"{key}.jpg") as image, Image.open(truth / f"{key}_segmentation.png") as mask:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert (mask.format, mask.mode) == ("PNG", "L")
            assert image.size == mask.size
            assert SMALL[0] <= image.size[0] <= SMALL[1]
            assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_a_photograph_depends_on_seed_and_number_alone():
    image, mask = photograph(5, 7, size=SMALL)
    photograph(5, 6, size=SMALL)
    again, mask_again = photograph(5, 7, size=SMALL)
    assert np.array_equal(image, again)
    assert np.array_equal(mask, mask_again)
    for seed, number in ((5, 8), (6, 7)):
        other, _ = photograph(seed, number, size=SMALL)
        assert other.shape != image.shape or not np.array_equal(other, image)


def test_a_longer_set_begins_with_the_files_of_a_shorter_one(tmp_path):
    synthesize(tmp_path / "three", 3, size=SMALL, seed=1)
    synthesize(tmp_path / "five", 5, size=SMALL, seed=1)
    three, five = files(tmp_path / "three"), files(tmp_path / "five")
    assert len(three) == 2 * 3 + 3 + 4
    assert three.items() < five.items()


def test_lesions_vary_and_stand_out_from_the_skin():
    """Every mask is a region of sensible size, and lesions are darker than their skin by more or less."""
    areas, contrasts, touching = [], [], 0
    for number in range(60):
        image, mask = photograph(0, number, size=SMALL)
        assert image.shape == (*mask.shape, 3)
        assert (image.dtype, mask.dtype) == (np.uint8, np.bool_)
        areas.append(mask.mean())
        grey = image.mean(axis=2)  # (H, W)
        skin = ~mask & (grey > 40)  # without the black frame
        contrasts.append((grey[skin].mean() - grey[mask].mean()) / grey[skin].mean())
        touching += mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
    assert 0.01 < min(areas) < 0.10
    assert 0.30 < max(areas) < 0.75
    assert min(contrasts) > 0.02
    assert np.quantile(contrasts, 0.9) > 2 * np.quantile(contrasts, 0.1)
    assert 3 < touching < 40


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty; remove it or choose another --out"):
        synthesize(tmp_path, 1, size=SMALL)
    with pytest.raises(UsageError, match="not empty"):
        synthesize(tmp_path / "notes.txt", 1, size=SMALL)
    assert files(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(("samples", "size"), [(0, SMALL), (1, (128, 96)), (1, (10, 20))])
def test_numbers_that_cannot_be_are_refused(tmp_path, samples, size):
    with pytest.raises(UsageError):
        synthesize(tmp_path / "out", samples, size=size)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_will_do(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    synthesize(out, 1, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(files(out)) == 7


def test_a_stopped_run_leaves_nothing_under_the_name_and_a_rerun_needs_no_help(tmp_path):
    def stop(done: int, total: int, title: str = "") -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "out", 4, size=SMALL, report=stop)
    assert not (tmp_path / "out").exists()
    synthesize(tmp_path / "out", 1, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").rglob("ISIC_9000001*"))


def test_importing_does_not_bring_in_torch():
    code = f"import sys; sys.path.insert(0, {str(Path(synthetic.__file__).parents[2])!r});"
    code += "import isicdist.data.synthetic; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
