"""Synthetic dermoscopy photographs with their masks, in the layout of the ISIC 2018 Task 1 archives.

For the demo and the tests, which need no real data. Skin and lesion absorb light by the Beer–Lambert law: each pixel
is `light · exp(−melanin · A − blood · B)` with absorptions A and B per colour channel, over random fields of melanin
and blood. Hairs, bubbles, ruler marks and the dark frame of the instrument are drawn on top. The mask is the region
inside the frame and inside the lesion's boundary, at half of its soft edge.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from shards.errors import UsageError
from shards.files import atomic_folder
from shards.progress import Report, no_report

INPUT_FOLDER = "ISIC2018_Task1-2_Training_Input"
TRUTH_FOLDER = "ISIC2018_Task1_Training_GroundTruth"
FIRST_NUMBER = 9_000_000  # of ISIC_9000000; real images have smaller numbers
_SUPERPIXEL_SAMPLES = 3
_SECTORS = 2048  # angular resolution of a lesion's boundary

# Absorption of one unit of pigment for (R, G, B): melanin absorbs blue most, blood green.
_MELANIN = np.array([0.50, 0.88, 1.32], np.float32)
_BLOOD = np.array([0.10, 0.70, 0.60], np.float32)

_NOTICE = "Synthetic images made by `isicdist synth` (seed {seed}). They show no person and come from no archive.\n"
_LICENSE = "CC0 1.0 Universal: https://creativecommons.org/publicdomain/zero/1.0/\n"


def synthesize(
    out: Path,
    samples: int,
    *,
    size: tuple[int, int] = (400, 640),
    seed: int = 0,
    report: Report = no_report,
) -> tuple[Path, Path]:
    """Write `samples` photographs and masks under `out`; returns the folders of the images and of the masks.

    `size`: minimum and maximum width in pixels; the height is three quarters of the width or a little less.
    `seed`: each file is a function of the seed and its own index, so that a longer set begins like a shorter one.
    `report`: called with (samples written, samples) after each.

    `out` appears when it is complete. Raises UsageError if it exists and is not empty, for less than one sample, and
    for a `size` out of range.
    """
    if samples < 1:
        raise UsageError(f"--samples {samples}: make at least 1")
    if not 64 <= size[0] <= size[1] <= 4096:
        raise UsageError(f"image widths {size[0]} to {size[1]}: give the smaller first, between 64 and 4096")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: already there and not empty; remove it or choose another --out")

    with atomic_folder(out.resolve()) as folder:
        images, truth = folder / INPUT_FOLDER, folder / TRUTH_FOLDER
        for each in (images, truth):
            each.mkdir()
            (each / "ATTRIBUTION.txt").write_text(_NOTICE.format(seed=seed))
            (each / "LICENSE.txt").write_text(_LICENSE)
        for index in range(samples):
            key = f"ISIC_{FIRST_NUMBER + index:07d}"
            image, mask = photograph(seed, index, size=size)
            Image.fromarray(image).save(images / f"{key}.jpg", quality=90)
            Image.fromarray(mask.astype(np.uint8) * 255).save(truth / f"{key}_segmentation.png", compress_level=3)
            if index < _SUPERPIXEL_SAMPLES:
                Image.fromarray(_superpixels(mask.shape)).save(images / f"{key}_superpixels.png")
            report(index + 1, samples)
    return out / INPUT_FOLDER, out / TRUTH_FOLDER


def photograph(seed: int, index: int, *, size: tuple[int, int] = (400, 640)) -> tuple[np.ndarray, np.ndarray]:
    """Draw one photograph (H, W, 3) uint8 RGB and its mask (H, W) bool: a pure function of the arguments."""
    rng = np.random.default_rng([seed, index])
    width = int(rng.integers(size[0], size[1] + 1))
    height = int(width * rng.choice([0.75, 0.75, 0.75, 0.667]))
    shape = (height, width)
    y, x = np.meshgrid(  # coordinates from the centre, in units of the image's height
        np.linspace(-0.5, 0.5, height, dtype=np.float32),
        np.linspace(-0.5, 0.5, width, dtype=np.float32) * (width / height),
        indexing="ij",
    )

    melanin, blood = _skin(rng, shape)
    inside, radius = _lesion(rng, x, y, melanin, blood)  # adds to melanin and blood
    if rng.random() < 0.4:
        _freckles(rng, shape, melanin)
    image = _light(rng, x, y)
    image *= np.exp(-(melanin[..., None] * _MELANIN + blood[..., None] * _BLOOD))
    image = 0.045 + 0.955 * image  # scattered light
    if rng.random() < 0.35:
        _blue_veil(rng, image, inside / radius, melanin)
    _hairs(rng, image)
    if rng.random() < 0.2:
        _bubbles(rng, image)
    if rng.random() < 0.1:
        _ruler(rng, image)
    mask = (inside > 0) & _vignette(rng, image, x, y)
    image += rng.normal(0, rng.uniform(0.004, 0.012), shape).astype(np.float32)[..., None]
    return (image.clip(0, 1) * 255).astype(np.uint8), mask


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: float) -> np.ndarray:
    """Draw smooth noise (H, W) float32 of mean 0 and variance about 1, with `cells` periods over the height."""
    rows = max(2, round(cells))
    columns = max(2, round(cells * shape[1] / shape[0]))
    grid = rng.standard_normal((rows + 1, columns + 1), dtype=np.float32)
    fine = Image.fromarray(grid).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(fine) * 1.35


def _skin(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw melanin and blood of the skin, each (H, W) float32: its type, blotches, furrows and small vessels."""
    pale = rng.random() < 0.88
    melanin = rng.uniform(0.03, 0.30) if pale else rng.uniform(0.40, 0.85)
    blood = rng.uniform(0.02, 0.20)
    furrows = np.abs(_noise(rng, shape, rng.uniform(30, 60)))
    grain = _noise(rng, shape, 110)
    uneven = _noise(rng, shape, 3)
    red = _noise(rng, shape, 7)
    vessels = (1 - 11 * np.abs(_noise(rng, shape, 8))).clip(0, 1) * (red - 0.3).clip(0, 1)
    relief = rng.uniform(0.006, 0.022) * (furrows + 0.6 * grain)
    return (
        melanin * (1 + 0.10 * uneven) + relief,
        blood * (1 + 0.16 * red - 0.12 * uneven) + rng.uniform(0, 0.22) * vessels + 0.4 * relief,
    )


def _lesion(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, melanin: np.ndarray, blood: np.ndarray
) -> tuple[np.ndarray, float]:
    """Add the pigment of a lesion to the fields `melanin` and `blood`, in place.

    Returns the signed distance to its boundary (H, W), above 0 inside, and its radius, in units of the image's height.
    """
    shape = (x.shape[0], x.shape[1])
    radius = float(np.exp(rng.uniform(np.log(0.13), np.log(0.50))))
    spread = 0.06 if rng.random() < 0.8 else 0.22  # one in five may extend beyond the image
    centre_x, centre_y = rng.normal(0, spread, 2).clip(-0.4, 0.4)
    turn, stretch = rng.uniform(0, np.pi), np.sqrt(rng.uniform(1, 1.8))
    u = ((x - centre_x) * np.cos(turn) + (y - centre_y) * np.sin(turn)).astype(np.float32) / stretch
    v = ((y - centre_y) * np.cos(turn) - (x - centre_x) * np.sin(turn)).astype(np.float32) * stretch

    jagged = rng.uniform(0.005, 0.035) * radius
    coarse = rng.uniform(0.02, 0.09) * radius
    blotches = _noise(rng, shape, 1.6 / radius)  # of the boundary and of the pigment alike
    u += coarse * blotches + jagged * _noise(rng, shape, min(9 / radius, 60))
    v += coarse * _noise(rng, shape, 1.6 / radius)
    sector = ((np.arctan2(v, u) + np.pi) * (_SECTORS / (2 * np.pi))).astype(np.int32) % _SECTORS
    outline = 1 + _waves(rng, np.arange(2, 10), rng.uniform(0.05, 0.26), falling=True)
    inside = radius * outline.clip(0.35, 1.8)[sector] - np.hypot(u, v)

    softness = radius * np.exp(rng.uniform(np.log(0.02), np.log(0.16)))
    alpha = 1 / (1 + np.exp((inside * (-2 / softness)).clip(-30, 30)))
    depth = (inside / radius).clip(0, 1)

    strength = float(np.exp(rng.uniform(np.log(0.32), np.log(2.3))))
    flush = rng.uniform(0.0, 0.22)
    if rng.random() < 0.18:  # pink: more blood than pigment
        strength, flush = 0.35 * strength, rng.uniform(0.35, 0.75)
    density = 0.8 + rng.uniform(-0.5, 0.9) * (depth - 0.35)  # dark at the centre or at the rim
    density += rng.uniform(0.1, 0.4) * blotches + rng.uniform(0.05, 0.3) * _noise(rng, shape, 5 / radius)
    density += rng.uniform(0.05, 0.16) * _noise(rng, shape, 55)
    if rng.random() < 0.35:  # darker on one side
        density += rng.uniform(0.3, 0.9) * (u if rng.random() < 0.5 else v) / radius
    if rng.random() < 0.25:  # regression: pale islands
        density *= 1 - 0.6 * (0.8 * _noise(rng, shape, 1.5 / radius) - 0.4).clip(0, 1)
    pattern = rng.choice(["network", "globules", "streaks", "plain"], p=[0.4, 0.25, 0.15, 0.2])
    if pattern == "network":
        density *= _network(rng, x, y)
    elif pattern == "globules":
        density += rng.uniform(0.3, 0.9) * _dots(rng, inside > 0.05 * radius, int(rng.integers(25, 110)))
    elif pattern == "streaks":
        rays = _waves(rng, np.arange(9, 44), 0.10)[sector]
        density *= 1 + rays * np.exp(-(((depth - 0.10) / 0.22) ** 2))
    melanin += strength * alpha * density.clip(0.22, 2.2)
    blood += flush * alpha * (0.7 + 0.5 * depth)
    if rng.random() < 0.3:  # an inflamed surround, outside the boundary
        blood += rng.uniform(0.03, 0.2) * np.exp(-((inside / (0.35 * radius)) ** 2))
    return inside, radius


def _waves(rng: np.random.Generator, orders: np.ndarray, size: float, falling: bool = False) -> np.ndarray:
    """Draw a random function of the angle, (_SECTORS,) float32: harmonics of `orders`, damped by 1/order if falling."""
    angles = np.linspace(0, 2 * np.pi, _SECTORS, endpoint=False)
    sizes = size * rng.standard_normal(orders.size) / (orders if falling else 1)
    phases = rng.uniform(0, 2 * np.pi, orders.size)
    return (sizes @ np.cos(np.outer(orders, angles) + phases[:, None])).astype(np.float32)


def _network(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Draw a pigment network as a factor (H, W): dark lines around pale holes, of uneven strength."""
    shape = (x.shape[0], x.shape[1])
    wavelength = rng.uniform(0.020, 0.034)
    bent_x = x + 0.4 * wavelength * _noise(rng, shape, 14)
    bent_y = y + 0.4 * wavelength * _noise(rng, shape, 14)
    holes = np.zeros(shape, np.float32)
    for direction in rng.uniform(0, np.pi) + np.array([0, np.pi / 3, 2 * np.pi / 3]):
        across = bent_x * np.float32(np.cos(direction)) + bent_y * np.float32(np.sin(direction))
        holes += np.cos(across * np.float32(2 * np.pi / wavelength))
    strength = (0.5 + 0.6 * _noise(rng, shape, 6)).clip(0, 1)
    return 1 - rng.uniform(0.12, 0.26) * strength * (holes - 0.3)


def _dots(rng: np.random.Generator, region: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` soft round dots with their centres in `region` (H, W) bool; (H, W) float32 in [0, 1]."""
    height, width = region.shape
    layer = Image.new("L", (width, height))
    draw = ImageDraw.Draw(layer)
    centres = np.flatnonzero(region)
    for centre in centres[rng.integers(0, centres.size, count)] if centres.size else ():
        row, column = divmod(int(centre), width)
        r = height * rng.uniform(0.004, 0.013)
        draw.ellipse((column - r, row - r, column + r, row + r), fill=int(rng.integers(110, 256)))
    return np.asarray(layer.filter(ImageFilter.GaussianBlur(height / 330)), np.float32) / 255


def _freckles(rng: np.random.Generator, shape: tuple[int, int], melanin: np.ndarray) -> None:
    """Add small pale brown spots to the melanin, in place; the mask does not contain them."""
    melanin += rng.uniform(0.1, 0.45) * _dots(rng, np.ones(shape, bool), int(rng.integers(3, 18)))


def _light(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Draw the incident light (H, W, 3): the lamp's colour and exposure, brighter to one side."""
    lamp = [(1.0, 0.98, 0.92), (0.88, 0.97, 1.16), (1.0, 0.96, 0.99), (0.98, 0.98, 1.02)]
    colour = np.array(lamp[rng.integers(len(lamp))], np.float32) * np.float32(rng.uniform(0.88, 1.06))
    slope_x, slope_y = rng.normal(0, 0.09, 2)
    return (1 + np.float32(slope_x) * x + np.float32(slope_y) * y)[..., None] * colour


def _blue_veil(rng: np.random.Generator, image: np.ndarray, depth: np.ndarray, melanin: np.ndarray) -> None:
    """Draw a blue-white veil over the darkest parts of the lesion, in place."""
    weight = (0.2 + 0.22 * _noise(rng, (image.shape[0], image.shape[1]), 7)).clip(0, 0.5)
    weight *= (4 * depth).clip(0, 1) * (melanin - 0.7).clip(0, 1)
    colour = np.array([0.34, 0.37, 0.46], np.float32)
    image += weight[..., None] * (colour - image)


def _paint(image: np.ndarray, layer: Image.Image, colour: np.ndarray, opacity: float) -> None:
    """Blend a colour into the image, in place; `layer` is the alpha mask (mode L) at twice the image's size."""
    cover = np.asarray(layer.reduce(2), np.float32) * np.float32(opacity / 255)  # (H, W)
    image += cover[..., None] * (colour.astype(np.float32) - image)


def _layer(image: np.ndarray) -> Image.Image:
    return Image.new("L", (2 * image.shape[1], 2 * image.shape[0]))


def _hairs(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw no, a few or many curved, tapering hairs of similar direction, in place."""
    kind = rng.random()
    count = 0 if kind < 0.5 else int(rng.integers(2, 12)) if kind < 0.85 else int(rng.integers(14, 40))
    if count == 0:
        return
    layer = _layer(image)
    draw = ImageDraw.Draw(layer)
    width, height = layer.size
    mean_direction, spread = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.9)
    thickness = height * rng.uniform(0.0018, 0.0050)
    t = np.linspace(0, 1, 22)
    for _ in range(count):
        direction = mean_direction + rng.normal(0, spread)
        along = np.array([np.cos(direction), np.sin(direction)])
        across = np.array([-along[1], along[0]])
        length = height * rng.uniform(0.25, 1.3)
        start = rng.uniform(-0.1, 1.1, 2) * (width, height) - along * length / 2
        bow, twist = length * rng.normal(0, 0.13), length * rng.normal(0, 0.05)
        offset = bow * t * (1 - t) * 4 + twist * np.sin(2 * np.pi * t)
        path = start + np.outer(t, along) * length + np.outer(offset, across)  # (22, 2) x, y
        half = thickness * rng.uniform(0.5, 1.2) * (1 - t)[:, None] ** 0.5 + 0.25
        tangent = np.gradient(path, axis=0)
        normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1) / np.linalg.norm(tangent, axis=1, keepdims=True)
        outline = np.concatenate([path + half * normal, (path - half * normal)[::-1]])
        draw.polygon([tuple(point) for point in outline.tolist()], fill=int(rng.integers(150, 256)))
    dark = rng.random() < 0.9
    colour = np.array([0.11, 0.08, 0.07]) * rng.uniform(0.6, 2.6) if dark else np.array([0.80, 0.70, 0.55])
    _paint(image, layer, colour, rng.uniform(0.65, 0.97))


def _bubbles(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw air bubbles of the immersion gel, in place: a pale ring, shaded on one side, with a highlight."""
    rings, shades = _layer(image), _layer(image)
    width, height = rings.size
    pale, shade = ImageDraw.Draw(rings), ImageDraw.Draw(shades)
    for _ in range(int(rng.integers(1, 9))):
        x, y = rng.uniform(0, 1, 2) * (width, height)
        r = 3 + height * np.exp(rng.uniform(np.log(0.006), np.log(0.06)))
        line = max(1, round(0.12 * r))
        pale.ellipse((x - r, y - r, x + r, y + r), outline=190, width=line)
        inner = r - line
        shade.arc((x - inner, y - inner, x + inner, y + inner), 20, 200, fill=120, width=line)
        pale.ellipse((x - 0.5 * r, y - 0.55 * r, x - 0.25 * r, y - 0.3 * r), fill=255)
    blur = ImageFilter.GaussianBlur(2)
    _paint(image, shades.filter(blur), np.array([0.25, 0.20, 0.20]), 0.5)
    _paint(image, rings.filter(blur), np.array([1.0, 0.98, 0.97]), 0.6)


def _ruler(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw the millimetre marks of a contact plate along one edge, every fifth longer, in place."""
    layer = _layer(image)
    draw = ImageDraw.Draw(layer)
    width, height = layer.size
    upright = rng.random() < 0.5
    length, edge = (height, width) if upright else (width, height)
    spacing = edge * rng.uniform(0.035, 0.06)
    base = edge * rng.uniform(0.90, 0.97)
    line = max(2, round(height / 300))
    for mark in range(1, int(length / spacing)):
        at = mark * spacing
        end = base - edge * (0.035 if mark % 5 else 0.06)
        draw.line((end, at, base, at) if upright else (at, end, at, base), fill=255, width=line)
    _paint(image, layer, np.array([0.10, 0.10, 0.12]), rng.uniform(0.5, 0.85))


def _vignette(rng: np.random.Generator, image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Darken the corners, and in some images draw the instrument's round black frame, in place.

    Returns the visible region, (H, W) bool.
    """
    centre = rng.normal(0, 0.02, 2).astype(np.float32)
    distance = np.hypot(x - centre[0], y - centre[1])
    image *= (1 - np.float32(rng.uniform(0.05, 0.4)) * distance**2)[..., None]
    frame = rng.uniform(0.52, 0.66)
    if rng.random() < 0.22:
        soft = np.exp(rng.uniform(np.log(0.004), np.log(0.03)))
        visibility = 1 / (1 + np.exp(((distance - frame) * (4 / soft)).clip(-30, 30)))
        rim = np.array([0.10, 0.06, 0.04], np.float32) * np.float32(rng.uniform(0.1, 0.7))
        image += (1 - visibility)[..., None] * (rim - image)
        return distance < frame
    return np.ones(distance.shape, bool)


def _superpixels(shape: tuple[int, ...]) -> np.ndarray:
    """Label square cells, (H, W, 3) uint8, encoded like the archive's superpixels: R + 256·G + 65536·B."""
    rows, columns = np.arange(shape[0]) // 16, np.arange(shape[1]) // 16
    label = rows[:, None] * (columns[-1] + 1) + columns
    return np.stack([label & 255, label >> 8 & 255, label >> 16], axis=-1).astype(np.uint8)
