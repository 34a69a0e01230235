"""The public API: every name of `__all__` can be imported, and docs/api.md documents exactly these names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import isicdist
import shards

API = (Path(__file__).parents[1] / "docs" / "api.md").read_text("utf-8")


@pytest.mark.parametrize("package", [isicdist, shards], ids=lambda package: package.__name__)
def test_every_public_name_can_be_imported_and_is_documented(package):
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    # `shards.build.build` documents the module `build`, which is public for its function.
    documented = re.findall(rf"^::: {package.__name__}\.(\w+)", API, flags=re.MULTILINE)
    assert sorted(documented) == [name for name in package.__all__ if name != "__version__"]


def test_importing_the_packages_imports_neither_torch_nor_numpy():
    script = "import sys, isicdist, shards; print(sorted({'torch', 'numpy', 'accelerate', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_citation_has_the_version():
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {isicdist.__version__}\n" in citation
