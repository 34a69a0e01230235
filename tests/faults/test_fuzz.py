"""The corpus of the fuzzer, read again; and, in `make test-faults`, a minute more of fuzzing for each reader."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.conftest import FULL, Tally
from tests.faults.fuzz import CORPUS, TARGETS

SECONDS = 55  # for each of the eleven: ten minutes together
OPTIONS = (f"-max_total_time={SECONDS}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_every_input_of_the_corpus_is_read_or_refused_as_the_docstring_says(name: str):
    inputs = [path for path in (CORPUS / name).iterdir() if path.is_file()]
    assert inputs
    for path in inputs:
        TARGETS[name](path.read_bytes())


@pytest.mark.skipif(not FULL, reason="make test-faults")
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed (the extra fuzz)")
@pytest.mark.parametrize("name", TARGETS)
def test_a_minute_of_fuzzing_finds_no_other_error_no_hang_and_no_growth(name: str, tmp_path: Path, tally: Tally):
    found = tmp_path / "found"
    found.mkdir()
    words = [sys.executable, "-m", "tests.faults.fuzz", name, str(found), *OPTIONS, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs
    tally(f"fuzzing: inputs of {name}", int(runs[1]))
