"""Files that mean harm: each is refused in one line or read as the data it is, in bounded memory; no more happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.conftest import Tally
from tests.faults.hostile import KINDS

MAX_GROWTH = 512 * 2**20
HARMLESS = {
    "indexes": {"size None", f"samples {10**30}"},
    "tables": {"no rows"},
    "members": {"mask: PNG whose rows go on for gigabytes"},  # which are not inflated
    "sources": {
        "image: PNG whose rows go on for gigabytes",
        "zip with absolute names",
    },  # of which the last part counts
}
"""Files that may be read: what they say is odd but does no harm."""


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_refused_in_one_line(python, shard_set: Path, tmp_path: Path, kind: str, tally: Tally):
    (tmp_path / "secret").write_text("secret")
    done = python("-m", "tests.faults.hostile", kind, shard_set, tmp_path)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{outcomes[-1:]} and then {done.stderr[-2000:]}"
    for each in outcomes:
        assert "refused" in each or each["name"] in HARMLESS.get(kind, ()), each
        assert "\n" not in each.get("message", ""), each
        assert len(each.get("message", "")) < 1000, each
        assert each["grown"] < MAX_GROWTH, each
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "canary").exists()
    tally(f"hostile files: {kind}", len(outcomes))
