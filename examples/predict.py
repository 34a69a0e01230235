"""Segment photographs from Python: python examples/predict.py RUN OUT PHOTOGRAPH [PHOTOGRAPH ...].

RUN is the folder of a run, or a copy of its `best` folder. No shard set is needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import isicdist


def main(arguments: list[str] | None = None) -> None:
    """Write OUT/NAME.png, 0 and 255, for each photograph, at the photograph's own resolution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("photographs", type=Path, nargs="+")
    options = parser.parse_args(arguments)

    model = isicdist.load_model(options.run)  # .to("cuda") where there is a GPU
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.photographs:
        with Image.open(path) as photograph:
            mask = model.predict(photograph, tta="flips")  # (H, W) bool
        Image.fromarray(mask).convert("L").save(options.out / f"{path.stem}.png")
        print(f"{path.name}: {mask.mean():.1%} lesion")


if __name__ == "__main__":
    main()
