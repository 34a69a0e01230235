"""Pages in the distribution's Chromium, on a desktop and on a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
# Chromium's own background traffic is off: it has nothing to do with the page. As root it has no sandbox.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DEVICES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}

OpenPage = Callable[[Path], "Page"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; Debian's package is called chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(params=list(DEVICES))
def open_page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[OpenPage]:
    """Open a file on each device; fails at the end for any message on the console and any request to elsewhere."""
    context = browser.new_context(**DEVICES[request.param])
    problems: list[str] = []

    def open_file(path: Path) -> Page:
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url[:80]}"))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(path.as_uri())
        return page

    requested: list[str] = []
    yield open_file
    context.close()
    assert problems == []
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []


@pytest.fixture(scope="session")
def report_page(
    tmp_path_factory: pytest.TempPathFactory, shard_set: Path, python: Callable[..., CompletedProcess[str]]
) -> Path:
    """The report of two runs, made by the commands that a user would run."""
    folder = tmp_path_factory.mktemp("report")
    first, second, page = folder / "first", folder / "second", folder / "report.html"
    settings = ["--recipe", "demo", "--steps", "3", "--model.base-channels", "2", "--log-every", "1"]
    for command in (
        ["train", "--data", shard_set, "--run", first, *settings],
        ["evaluate", "--data", shard_set, "--checkpoint", first],
    ):
        done = python("-m", "isicdist", *command)
        assert done.returncode == 0, done.stderr
    shutil.copytree(first, second)
    config = json.loads((first / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({**config, "seed": 1, "device": "a GPU with a rather long name"}))
    done = python("-m", "isicdist", "report", first, second, "--out", page)
    assert done.returncode == 0, done.stderr
    return page
