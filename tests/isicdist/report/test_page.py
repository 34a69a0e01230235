"""The page: self-contained, escaped, the same for the same files, and complete in what it says."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from isicdist.report import report
from isicdist.report.collect import RunFiles
from isicdist.report.page import REFERENCE, render_page

QUIET = Console(quiet=True)
DATASET = {
    "splits": {"train": 29, "val": 9, "test": 10},
    "counts": {
        "found": 98,
        "packed": 96,
        "rejected": 2,
        "ignored": 0,
        "reasons": {"no_mask": 2},
        "duplicates": {"near": 3},
        "duplicates_across_splits": 1,
    },
}
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Collects the elements and the text of a page; fails where an element is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self) -> str:
        return re.sub(r"\s+", " ", self.text)


@pytest.fixture(scope="module")
def page(evaluated_runs: tuple[Path, Path]) -> Page:
    return Page(render_page(RunFiles.read_all(evaluated_runs)))


def test_it_loads_nothing_from_elsewhere(page):
    urls = [attributes.get("src") or attributes.get("href", "") for _, attributes in page.elements]
    urls = [url for url in urls if url]
    assert urls
    assert all(url.startswith(("data:", "#")) for url in urls)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_what_users_name_is_escaped(page):
    assert "<script>alert(1)</script>" in page.words()  # as text: the value of a subgroup
    assert "<b>second" in page.words()
    assert len(page.all("script")) == 1  # the slider's
    assert not page.all("b")


def test_every_picture_has_its_words_and_every_link_its_section(page):
    assert all(image["alt"] for image in page.all("img"))
    sections = {section["id"] for section in page.all("section")}
    assert {link["href"].removeprefix("#") for link in page.all("a")} == sections
    assert {"data", "comparison", "training", "split-test", "reproduce"} == sections


def test_the_scores_have_intervals_beside_the_reference(page, evaluated_runs):
    scores = RunFiles.read(evaluated_runs[0], name="first").evaluations["test"].summary.at_tuned.original
    assert scores is not None
    low, high = scores.interval_95["thresholded_jaccard"]
    assert f"{scores.thresholded_jaccard:.3f} {low:.3f} to {high:.3f}" in page.words()
    assert REFERENCE == {"mean_dice": 0.898, "mean_jaccard": 0.838, "thresholded_jaccard": 0.802}
    assert "ISIC 2018 winneroriginal10000.898–0.8380.802" in page.words()
    assert "comparable only with scores at the original resolution on those images" in page.words()


def test_there_is_a_slider_for_each_picture_and_a_choice_of_layers(page):
    sliders = [each for each in page.all("input") if each["type"] == "range"]
    layers = [each for each in page.all("img") if each.get("class", "").startswith("layer")]
    assert len(sliders) == 2 * 9  # two runs, three images of each group
    assert len(layers) == 2 * len(sliders)
    assert [each["value"] for each in page.all("input") if each["type"] == "radio"] == [
        "slider", "both", "mask", "prediction", "photo"
    ]  # fmt: skip


def test_the_same_files_give_the_same_page_of_less_than_5_mb(tmp_path, evaluated_runs):
    for name in ("a/one.html", "b/two.html"):
        report(evaluated_runs, QUIET, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a/one.html", "b/two.html"))
    assert first == second
    assert len(first) < 5_000_000


def test_one_run_has_no_comparison(evaluated_runs):
    page = Page(render_page(RunFiles.read_all(evaluated_runs[:1])))
    assert "comparison" not in {section["id"] for section in page.all("section")}
    assert "not recorded" in page.words()  # the shard set


def test_the_shard_set_is_described_where_it_is_recorded(tmp_path, make_run):
    page = Page(render_page(RunFiles.read_all([make_run(tmp_path / "run", dataset=DATASET)])))
    words = page.words()
    assert "train 29, val 9, test 10" in words
    assert "2 of 98 files; no_mask 2" in words
    assert "3 near pairs, 1 across splits" in words
    assert "64 × 64 pixels (stretch)" in words


def test_what_is_missing_or_out_of_date_is_pointed_out(tmp_path, run, evaluated_runs):
    assert "run is not evaluated yet" in Page(render_page(RunFiles.read_all([run]))).words()
    other = shutil.copytree(evaluated_runs[0], tmp_path / "other")
    shutil.rmtree(other / "evaluation" / "test" / "examples")
    path = other / "evaluation" / "test" / "summary.json"
    path.write_text(path.read_text().replace('"model_step": 2', '"model_step": 1'))
    page = Page(render_page(RunFiles.read_all([other])))
    assert "other: test was evaluated at step 1, but the best model is now that of step 2" in page.words()
    assert not [each for each in page.all("input") if each["type"] == "range"]
