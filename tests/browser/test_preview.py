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


def test_samples_are_filtered_by_split_and_flag(open_page, preview: Path):
    page = open_page(preview)
    tiles, status = page.locator(".tile:visible"), page.get_by_role("status")
    assert (tiles.count(), status.inner_text()) == (9, "9 of 9 samples")
    page.get_by_label("train").uncheck()
    assert (tiles.count(), status.inner_text()) == (6, "6 of 9 samples")
    assert page.locator('.tile:visible[data-split="train"]').count() == 0
    page.evaluate("document.querySelector('.tile[data-split=val]').dataset.flags = 'oriented other'")
    page.evaluate("document.querySelector('[name=flag]').value = 'oriented'")
    page.get_by_label("val").uncheck()
    page.get_by_label("val").check()
    assert tiles.count() == 1


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
