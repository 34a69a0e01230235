"""The `isic-shards` command: its output, its exit codes and one-line errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from shards import cli
from shards.build import build
from shards.planning.plan import BuildOptions
from shards.reader import ShardSet
from shards.verify import verify


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture(scope="module")
def built(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "set"
    build(str(pictures), str(pictures), out, BuildOptions(size=32), workers=1)
    return out


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    """A copy of the set that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "set"))


def test_help_imports_no_torch_and_no_webdataset():
    code = "import sys, shards.cli\ntry: shards.cli.main(['--help'])\nexcept SystemExit as end: code = end.code\n"
    code += "sys.exit(code or sum(name in sys.modules for name in ('torch', 'webdataset', 'fsspec')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_build_then_verify_info_and_preview(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "set"
    sources = ("--images", pictures, "--masks", pictures)
    assert run("build", *sources, "--out", out, "--size", "32", "--workers", "1") == 0
    assert "80 files found, 80 packed, 0 rejected, 0 ignored" in capsys.readouterr().out
    assert run("build", *sources, "--out", out, "--size", "32") == 0
    assert "already complete" in capsys.readouterr().out
    assert run("verify", out, "--deep") == 0
    assert run("info", out) == 0
    assert ShardSet.open(out).digest in capsys.readouterr().out
    for name in ("sheet.png", "sheet.html"):
        assert run("preview", out, "--out", tmp_path / name, "--samples", "9") == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 6 * 192


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["build", "--size", "x"], 2, "See isic-shards --help"),
        (["nothing"], 2, "nothing"),
        (["info", "nowhere"], 1, "there is no such folder"),
        (["build", "--images", "no", "--masks", "no", "--out", "set"], 1, "no: there is no such folder or archive"),
        (["build", "--images", ".", "--masks", ".", "--out", "set", "--size", "3"], 2, "--size 3"),
        (["build", "--images", ".", "--masks", ".", "--out", "set", "--fit", "x"], 2, 'Choose from: "stretch", "pad"'),
        (["preview", "nowhere", "--out", "sheet.gif"], 2, "ends in .png"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert list(tmp_path.iterdir()) == []


def test_the_flags_are_the_fields_of_the_options(pictures: Path, tmp_path: Path):
    sources = ("--images", pictures, "--masks", pictures, "--out", tmp_path / "set", "--workers", "1")
    flags = ("--size", "original", "--seed", "4", "--samples-per-shard", "9", "--original-masks", "none")
    assert run("build", *sources, *flags, "--split", "train=0.5,val=0.5", "--on-bad-input", "skip") == 0
    options = BuildOptions(
        size="original",
        seed=4,
        samples_per_shard=9,
        original_masks="none",
        split="train=0.5,val=0.5",
        on_bad_input="skip",
    )
    built = dict(ShardSet.open(tmp_path / "set").index.built)
    assert built.pop("inputs")
    assert built == options.to_json()


def test_bad_inputs_are_listed_in_a_table(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = Path(shutil.copytree(pictures, tmp_path / "in"))
    (folder / "ISIC_0000001_segmentation.png").unlink()
    assert run("build", "--images", folder, "--masks", folder, "--out", tmp_path / "set", "--workers", "1") == 1
    printed = capsys.readouterr().err
    assert "no-mask" in printed
    assert "1 of the input files cannot be used (first: ISIC_0000001.jpg" in printed
    assert not (tmp_path / "set").exists()


def test_a_placeholder_among_the_groups_is_warned_of(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = tmp_path / "metadata.csv"
    rows = (f"ISIC_{number:07d},{'unknown' if number < 30 else number}\n" for number in range(40))
    table.write_text("id,patient\n" + "".join(rows))
    options = ("--groups", f"{table}:patient", "--split", "train=0.5,val=0.5", "--size", "32", "--workers", "1")
    assert run("build", "--images", pictures, "--masks", pictures, "--out", tmp_path / "set", *options) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: --groups: 30 of the 40 images have patient 'unknown', and so are in one split")
    assert [line[:14] for line in lines] == ["warning: --gro", "warning: split"]  # one of the two has less than half


def test_verify_names_shard_and_key_of_a_flipped_bit(own: Path, capsys: pytest.CaptureFixture[str]):
    split = ShardSet.open(own).split("train")
    data = bytearray((own / split.shards[0]).read_bytes())
    data[int(split.table["offset"][2]) + 700] ^= 4
    (own / split.shards[0]).write_bytes(data)
    assert run("verify", own) == 1
    assert f"train/000000.tar: {split.key(2)}.jpg is corrupt" in capsys.readouterr().err


def test_verify_finds_what_is_cut_missing_or_padded(own: Path):
    train, val, test = (own / name / "000000.tar" for name in ("train", "val", "test"))
    train.write_bytes(train.read_bytes()[:20480])
    val.unlink()
    data = bytearray(test.read_bytes())
    data[-1] = 1
    test.write_bytes(data)
    faults = verify(own).faults
    assert any(fault.startswith("train/000000.tar: ") and "is cut off" in fault for fault in faults)
    assert "val/000000.tar: the shard is missing" in faults
    assert "test/000000.tar: not the sha256 of the index, though every member is right" in faults
