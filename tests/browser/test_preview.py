"""The preview page in Chromium: complete, filtered by split and flag, its masks toggle, and axe-core finds no fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="session")
def preview(
    tmp_path_factory: pytest.TempPathFactory, shard_set: Path, python: Callable[..., CompletedProcess[str]]
) -> Path:
    """A page of three samples of each split."""
    page = tmp_path_factory.mktemp("preview") / "sheet.html"
    done = python("-m", "shards", "preview", shard_set, "--out", page, "--samples", "9")
    assert done.returncode == 0, done.stderr
    return page


def test_every_picture_is_shown_and_nothing_is_wider_than_the_page(open_page, preview: Path):
    page = open_page(preview)
    pictures = page.evaluate("[...document.images].map(each => each.complete && each.naturalWidth > 0)")
    assert pictures == [True] * 18
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_samples_are_filtered_by_split(open_page, preview: Path):
    page = open_page(preview)
    tiles, status = page.locator(".tile:visible"), page.get_by_role("status")
    assert (tiles.count(), status.inner_text()) == (9, "9 of 9 samples")
    page.get_by_label("train").uncheck()
    assert (tiles.count(), status.inner_text()) == (6, "6 of 9 samples")
    assert page.locator('.tile:visible[data-split="train"]').count() == 0


def test_samples_are_filtered_by_flag(open_page, preview: Path, tmp_path: Path):
    # The generated images have no flags: give one to a sample, and the choice of it to the form.
    flagged = preview.read_text().replace('data-flags=""', 'data-flags="oriented other"', 1)
    choice = '<label><input type="radio" name="flag" value="oriented"> oriented</label>'
    (tmp_path / "flagged.html").write_text(flagged.replace("</form>", f"{choice}</form>"))
    page = open_page(tmp_path / "flagged.html")
    assert page.locator(".tile:visible").count() == 9
    page.get_by_label("oriented").check()
    assert page.locator(".tile:visible").count() == 1
    assert page.get_by_role("status").inner_text() == "1 of 9 samples"


def test_masks_toggle(open_page, preview: Path):
    page = open_page(preview)
    masks = page.locator(".mask:visible")
    assert masks.count() == 9
    page.get_by_label("masks").uncheck()
    assert masks.count() == 0
    assert page.locator(".photo:visible").count() == 9


def test_axe_finds_no_fault(open_page, preview: Path):
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(open_page(preview)).response
    assert [(fault["id"], fault["nodes"][0]["html"][:150]) for fault in results["violations"]] == []
