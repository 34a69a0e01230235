"""The report in Chromium: complete at both widths, its slider moves, and axe-core finds no fault."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser


def clip_of(layer: Locator) -> str:
    return layer.evaluate("element => getComputedStyle(element).clipPath")


def overflow(page: Page) -> list[str]:
    """Name the elements that reach over the right edge and do not scroll inside of a box of their own."""
    return page.evaluate(
        """() => [...document.body.querySelectorAll("*")]
            .filter(each => each.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .filter(each => !each.parentElement.closest(".scroll, pre, .viewer"))
            .map(each => each.outerHTML.slice(0, 100))"""
    )


def test_every_picture_is_shown_and_nothing_is_wider_than_the_page(open_page, report_page: Path):
    page = open_page(report_page)
    pictures = page.evaluate("[...document.images].map(each => each.complete && each.naturalWidth > 0)")
    assert len(pictures) == 8 + 2 * 9 * 3  # the charts and the gallery
    assert all(pictures)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert overflow(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_slider_moves_the_border_by_key_and_by_drag(open_page, report_page: Path):
    page = open_page(report_page)
    picture = page.locator(".picture").first
    slider, viewer = picture.locator("input"), picture.locator(".viewer")
    mask, prediction = picture.locator(".layer.mask"), picture.locator(".layer.prediction")
    assert "50%" in clip_of(prediction)
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "55"
    assert "55%" in clip_of(prediction)
    before = clip_of(mask)
    viewer.scroll_into_view_if_needed()
    box = viewer.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 5, box["y"] + box["height"] / 2)
    page.mouse.up()
    assert slider.input_value() == "20"
    assert "20%" in clip_of(prediction)
    assert clip_of(mask) != before
    other = page.locator(".picture").nth(1)  # no other picture has moved
    assert other.locator("input").input_value() == "50"


@pytest.mark.parametrize(
    ("mode", "shown"),
    [("both", (True, True)), ("mask", (True, False)), ("prediction", (False, True)), ("photo", (False, False))],
)
def test_the_layers_can_be_chosen(open_page, report_page: Path, mode: str, shown: tuple[bool, bool]):
    page = open_page(report_page)
    page.locator(f'.modes input[value="{mode}"]').check()
    picture = page.locator(".picture").last
    layers = [picture.locator(".layer.mask"), picture.locator(".layer.prediction")]
    assert tuple(layer.is_visible() for layer in layers) == shown
    assert picture.locator(".photo").is_visible()
    assert not picture.locator("input").is_visible()
    assert all(clip_of(layer) == "none" for layer in layers)


def test_on_paper_everything_is_open_and_nothing_is_cut_off(open_page, report_page: Path):
    page = open_page(report_page)
    page.emulate_media(media="print")
    assert page.locator("pre").last.is_visible()
    assert not page.locator("nav").is_visible()
    assert clip_of(page.locator(".layer.mask").first) == "none"
    assert overflow(page) == []


def test_axe_finds_no_fault(open_page, report_page: Path):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(report_page)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    results = Axe().run(page).response
    faults = [(fault["id"], fault["nodes"][0]["html"][:150]) for fault in results["violations"]]
    assert faults == []
    assert len(results["passes"]) > 20  # it has looked
