"""Pack a dataset with names of its own: python examples/own_dataset.py OUT.

It draws 60 pictures of 20 patients as `scans/NAME.png` and `labels/NAME_mask.png`, and a table that names the patient
of each; for data of yours, replace `draw`. All pictures of a patient stay in one split.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from shards import BuildOptions, ShardSet, build, verify


def draw(folder: Path, patients: int = 20, pictures: int = 3) -> None:
    """Draw discs on noise, their masks (0 and 255), and table.csv with the columns image and patient."""
    rng = np.random.default_rng(0)
    for name in ("scans", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = [(f"P{patient}-{picture}", f"P{patient}") for patient in range(patients) for picture in range(pictures)]
    for name, _ in rows:
        y, x = np.mgrid[:96, :128]
        centre_y, centre_x, radius = rng.uniform((30, 40, 10), (66, 88, 30))
        disc = np.hypot(y - centre_y, x - centre_x) < radius  # (96, 128) bool
        scan = rng.integers(150, 220, (96, 128, 3)) - 90 * disc[..., None]
        Image.fromarray(scan.astype(np.uint8)).save(folder / "scans" / f"{name}.png")
        Image.fromarray(disc).convert("L").save(folder / "labels" / f"{name}_mask.png")
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "patient"), *rows])


def main(arguments: list[str] | None = None) -> None:
    """Draw into OUT/raw, pack into OUT/set, check every byte, and read a sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args(arguments).out

    draw(out / "raw")
    options = BuildOptions(
        size=64,
        fit="pad",  # keep the aspect ratio
        mask_suffix="_mask",
        groups=f"{out / 'raw' / 'table.csv'}:patient",
        split="train=0.6,val=0.2,test=0.2",
    )
    build.build(str(out / "raw" / "scans"), str(out / "raw" / "labels"), out / "set", options)
    assert not verify.verify(str(out / "set"), deep=True).faults

    shard_set = ShardSet.open(out / "set")
    for name in ("train", "val", "test"):
        split = shard_set.split(name)
        patients = sorted({split.meta(index)["group"] for index in range(len(split))})
        print(f"{name}: {len(split)} samples of patients {', '.join(patients)}")
    image, mask = split.image(0), split.mask(0)  # (64, 64, 3) and (64, 64) uint8
    print(f"{split.key(0)}: image {image.shape}, lesion {mask.mean():.1%}")


if __name__ == "__main__":
    main()
