"""The page of an audit in Chromium: verdicts by keyboard and touch, remembered, and saved as a table that is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from isicdist.config import Fold
from shards.exclusions import read_excluded
from tests.isicdist.test_ensemble import save_fold

pytestmark = pytest.mark.browser


@pytest.fixture(scope="session")
def audit_page(
    tmp_path_factory: pytest.TempPathFactory, shard_set: Path, python: Callable[..., CompletedProcess[str]]
) -> Path:
    """The audit of a set by two models as they were initialised."""
    folder = tmp_path_factory.mktemp("audit")
    for fold in Fold(number=1, count=2).all:
        save_fold(folder / "runs", shard_set, fold)
    out = folder / "out"
    done = python("-m", "isicdist", "audit", "--data", shard_set, "--run", folder / "runs", "--out", out)
    assert done.returncode == 0, done.stderr
    return out / "audit.html"


def test_every_picture_is_shown_and_nothing_is_wider_than_the_page(open_page, audit_page: Path):
    page = open_page(audit_page)
    assert page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".card").count() > 3


def test_verdicts_by_keyboard_are_saved_as_a_table_to_exclude_by(open_page, audit_page: Path, tmp_path: Path):
    page = open_page(audit_page)
    keys = page.evaluate("[...document.querySelectorAll('.card')].map(card => card.dataset.key)")
    for key in "wkuw":
        page.keyboard.press(key)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("k")  # the fourth, once more
    number = page.locator(".card").count()
    assert page.get_by_role("status").inner_text() == f"4 of {number} looked at, 1 wrong"
    with page.expect_download() as download:
        page.keyboard.press("s")
    table = tmp_path / download.value.suggested_filename
    download.value.save_as(table)
    assert table.name == "verdicts.csv"
    assert read_excluded(table) == {keys[0]}
    lines = table.read_text().splitlines()
    assert lines[0] == "rank,id,split,score,reason,verdict"
    assert [line.rpartition(",")[2] for line in lines[1:5]] == ["wrong", "keep", "unsure", "keep"]
    assert len(lines) == number + 1


def test_verdicts_by_touch_last_over_a_reload_and_the_outlines_toggle(open_page, audit_page: Path):
    page = open_page(audit_page)
    page.locator(".card").nth(1).get_by_label("unsure").check()
    page.reload()
    assert page.locator(".card").nth(1).get_by_label("unsure").is_checked()
    assert page.locator(".card").nth(1).get_attribute("data-verdict") == "unsure"
    assert page.locator(".outline:visible").count() > 0
    page.keyboard.press("h")
    assert page.locator(".outline:visible").count() == 0


def test_axe_finds_no_fault(open_page, audit_page: Path):
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(open_page(audit_page)).response
    assert [(fault["id"], fault["nodes"][0]["html"][:150]) for fault in results["violations"]] == []
