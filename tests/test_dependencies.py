"""Licences of what is installed with isicdist or one of its extras, and the bill of materials of its wheel."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOR_DEVELOPERS = {"bench", "dev", "cluster-tests", "fuzz", "docs"}
USED = [
    Requirement(text).name
    for extra, requirements in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
    for text in requirements
    if extra not in FOR_DEVELOPERS
]
PINNED = {
    canonicalize_name(name)
    for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
PERMISSIVE = re.compile(r"Apache|MIT|BSD|PSF|Python Software Foundation")


@pytest.mark.parametrize("name", USED)
def test_a_dependency_has_a_permissive_licence(name: str):
    try:
        found = metadata(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    fields = [each for name in ("License-Expression", "License") for each in found.get_all(name) or []]
    classifiers = [each for each in found.get_all("Classifier") or [] if each.startswith("License ::")]
    named = " ".join([*(each.partition("\n")[0] for each in fields), *classifiers])
    assert PERMISSIVE.search(named), named
    assert "GPL" not in named


def test_every_dependency_has_a_version_that_it_is_tested_with():
    """The bill of materials of the wheel takes it from there."""
    unpinned = {"trackio"}  # it asks for an older Pillow than the pins: see pyproject.toml
    assert set(map(canonicalize_name, USED)) - PINNED == unpinned


def test_the_pins_can_be_installed_on_the_oldest_python():
    """3.11.0 means 3.11.0: Debian 12 has 3.11.2, and a pin that asks for 3.11.5 cannot be installed there."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    refused = [
        f"{each.name} {each.version} requires Python {wanted}"
        for each in distributions()
        if canonicalize_name(each.name) in PINNED
        for wanted in each.metadata.get_all("Requires-Python") or []
        if not SpecifierSet(wanted).contains(oldest)
    ]
    assert not refused
