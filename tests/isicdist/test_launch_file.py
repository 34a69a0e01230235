"""`isicdist launch-file`: each launch file is listed, shipped in the wheel, printed as it is, never written over."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from isicdist import cli
from isicdist.launch_file import launch_files

ROOT = Path(__file__).parents[2]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["launch-file", *words])
    return int(ended.value.code or 0)


def test_the_wheel_ships_every_launch_file():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    shipped = build["targets"]["wheel"]["force-include"]
    assert shipped == {f"launch/{name}": f"isicdist/launch_files/{name}" for name in launch_files().values()}
    on_disk = {path.name for path in (ROOT / "launch").iterdir()} - {
        "README.md",
        "Dockerfile",
    }  # an image is built from a checkout
    assert on_disk == set(launch_files().values())


@pytest.mark.parametrize("name", ["gpu8", "gpu8.yaml", "slurm", "slurm.sbatch"])
def test_prints_the_file(name, capsys):
    assert run(name) == 0
    file = "gpu8.yaml" if name.startswith("gpu8") else "slurm.sbatch"
    assert capsys.readouterr().out == (ROOT / "launch" / file).read_text()


def test_writes_the_file_but_never_over_another(tmp_path, capsys):
    out = tmp_path / "launch" / "two.yaml"
    assert run("cpu2", "--out", str(out)) == 0
    assert out.read_text() == (ROOT / "launch" / "cpu2.yaml").read_text()
    out.write_text("edited")
    assert run("cpu2", "--out", str(out)) == 2
    assert capsys.readouterr().err == f"error: {out}: exists already; remove it, or give another --out\n"
    assert out.read_text() == "edited"


def test_an_unknown_name_suggests_the_nearest(capsys):
    assert run("gpu9") == 2
    names = "cpu2, gpu1, gpu8, kubernetes, multinode, skypilot, slurm-shards, slurm"
    assert capsys.readouterr().err == f"error: no launch file 'gpu9' (did you mean gpu8?); there are: {names}\n"
