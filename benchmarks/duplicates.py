"""Benchmark of finding duplicates: what share of changed photographs is recognised, next to imagehash's pHash.

    python benchmarks/duplicates.py --images ISIC2018_Task1-2_Training_Input_256.zip
    pip install -c constraints.txt -e '.[bench]'

Every tenth photograph is changed in each way of the table, saved as a JPEG of quality 80 and compared with itself as it
was. The last row counts the pairs of photographs of the set, unchanged, that are called duplicates.

    isicdist    `shards.planning.duplicates`: candidates by hash, then a comparison of their blocks
    hash alone  its candidates
    imagehash   imagehash.phash, 64 bits, of which 2, 4 or 10 may differ
"""

from __future__ import annotations

import argparse
import io
import platform
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version

import imagehash  # pyright: ignore[reportMissingImports]
import numpy as np
from PIL import Image

from shards.inputs.decode import load_image
from shards.inputs.source import open_sources
from shards.planning.duplicates import HASH_BYTES, near_pairs, perceptual_hash, same_photograph

IMAGEHASH_DISTANCES = np.array((2, 4, 10))
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def recoloured(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """Change gamma and gain of each channel."""
    levels = (np.arange(256)[:, None] / 255) ** random.uniform(0.6, 1.6, 3) * random.uniform(0.6, 1.1, 3)
    table = np.clip(255 * levels, 0, 255).astype(np.uint8)  # (256, 3)
    return Image.fromarray(
        np.take_along_axis(table, np.asarray(picture).reshape(-1, 3), 0).reshape(*picture.size[::-1], 3)
    )


def saved(quality: int) -> Change:
    """Save as a JPEG."""

    def change(picture: Image.Image, random: np.random.Generator) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return change


def halved(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """Reduce to half of the size."""
    return picture.resize((picture.width // 2, picture.height // 2))


def cropped(share: float) -> Change:
    """Cut off a share of each side, from one edge or from both."""

    def change(picture: Image.Image, random: np.random.Generator) -> Image.Image:
        left, top = (random.uniform(0, share, 2) * picture.size).tolist()
        right, bottom = left + (1 - share) * picture.width, top + (1 - share) * picture.height
        return picture.crop((round(left), round(top), round(right), round(bottom)))

    return change


def turned(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """Rotate by one degree."""
    return picture.rotate(random.choice((-1, 1)), Image.Resampling.BILINEAR)


def blurred(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """Lose half of the resolution."""
    return halved(picture, random).resize(picture.size)


def several(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """Recolour, crop by 4 % and halve."""
    return halved(cropped(0.04)(recoloured(picture, random), random), random)


CHANGES: dict[str, Change] = {
    "JPEG of quality 30": saved(30),
    "half of the size": halved,
    "blurred": blurred,
    "recoloured": recoloured,
    "cropped by 2 %": cropped(0.02),
    "cropped by 4 %": cropped(0.04),
    "cropped by 8 %": cropped(0.08),
    "turned by 1°": turned,
    "recoloured, cropped by 4 %, half of the size": several,
    "mirrored": lambda picture, random: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def candidates(hashes: list[bytes]) -> list[tuple[int, int, int]]:
    """Pairs of indices of near hashes of isicdist, with their distance."""
    return near_pairs(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES))


def imagehash_of(picture: Image.Image) -> np.ndarray:
    """The 64 bits of imagehash's pHash."""
    return imagehash.phash(picture).hash.ravel()


def main() -> None:
    """Compare and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", required=True, help="a folder or archive of photographs")
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    sources, files = open_sources([options.images])
    files = [file for file in files if file.name.lower().endswith((".jpg", ".jpeg"))]
    pictures = [load_image(file, sources, "original", None)[0] for file in files]
    start = time.perf_counter()
    hashes = [perceptual_hash(picture) for picture in pictures]
    ours = time.perf_counter() - start
    bits = np.stack([imagehash_of(picture) for picture in pictures])
    theirs = time.perf_counter() - start - ours
    print(f"{date.today()}, {platform.processor() or platform.machine()}, imagehash {version('imagehash')}")
    print(f"{len(pictures)} photographs; a hash takes {1e3 * ours / len(pictures):.2f} ms, ", end="")
    print(f"that of imagehash {theirs / ours:.1f} times that\n")
    print("| change | isicdist | hash alone |" + "".join(f" imagehash, {bits} |" for bits in IMAGEHASH_DISTANCES))
    print("|---|---|---|" + "---|" * len(IMAGEHASH_DISTANCES))
    random = np.random.default_rng(0)
    chosen = range(0, len(pictures), options.every)
    for name, change in CHANGES.items():
        found = np.zeros(2 + len(IMAGEHASH_DISTANCES))
        for index in chosen:
            after = saved(80)(change(pictures[index], random), random)
            near = bool(candidates([hashes[index], perceptual_hash(after)]))
            close = np.count_nonzero(bits[index] != imagehash_of(after)) <= IMAGEHASH_DISTANCES
            found += (near and same_photograph(pictures[index], after), near, *close)
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in found / len(chosen)) + " |")
    near_in_set = [(i, j) for i, j, _ in candidates(hashes)]
    start = time.perf_counter()
    same = sum(same_photograph(pictures[i], pictures[j]) for i, j in near_in_set)
    took = 1e3 * (time.perf_counter() - start) / max(1, len(near_in_set))
    signs = np.where(bits, 1, -1).astype(np.float32)
    distances = ((len(bits[0]) - signs @ signs.T) / 2)[np.triu_indices(len(bits), 1)]
    close_in_set = [int((distances <= limit).sum()) for limit in IMAGEHASH_DISTANCES]
    print(f"| *pairs in the set itself* | {same} | {len(near_in_set)} | " + " | ".join(map(str, close_in_set)) + " |")
    print(f"\nA comparison of the blocks of two decoded photographs takes {took:.1f} ms.")


if __name__ == "__main__":
    main()
