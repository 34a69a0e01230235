"""A corpus of hostile files, and what reads each: run as a program, it opens all of a kind and prints how each ended.

    python -m tests.faults.hostile KIND SET FOLDER

A line of JSON for each: its name, `refused` with the error's type and message, or `read` with what came of it, and by
how many bytes the peak of the memory grew. Nothing here may touch FOLDER/canary or read FOLDER/secret.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import resource
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.recfunctions import repack_fields
from PIL import Image

from shards import format, layout
from shards.errors import ToolkitError
from shards.reader import ShardSet

DEEP = "[" * 200_000
Case = tuple[str, Callable[[], Any]]
"""Name of a hostile file, and the call that writes and opens it."""


class Bomb:
    """Unpickled, it touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def read_all(root: Path) -> int:
    """Read a set as training does: every image, mask and JSON of every split."""
    shards, read = ShardSet.open(root), 0
    for name in shards.index.splits:
        split = shards.split(name)
        for index in range(len(split)):
            split.image(index)
            split.mask(index)
            split.meta(index)
            read += 1
    return read


def write_index(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an index as an attacker would: with the right digest."""
    value = json.loads((root / format.INDEX_NAME).read_bytes())
    change(value)
    value["digest"] = format.digest_of(value)
    (root / format.INDEX_NAME).write_bytes(format.canonical_json(value))


def indexes(root: Path, folder: Path) -> Iterator[Case]:
    """index.json: names that point elsewhere, gigantic numbers, other types, JSON that explodes."""

    def changed(change: Callable[[dict[str, Any]], None]) -> Callable[[], Any]:
        def call() -> int:
            write_index(root, change)
            return read_all(root)

        return call

    def shard_name(name: str) -> Callable[[dict[str, Any]], None]:
        return lambda value: value["splits"]["train"]["shards"][0].update(name=name)

    names = [
        "../secret",
        f"{folder}/secret",
        f"pipe:touch {folder}/canary",
        f"file://{folder}/secret",
        "http://[::1]/x",
    ]
    names += ["train/../../secret", "train/000000.tar\0", "train/000000.tar\n", "TRAIN/000000.tar", "", "a" * 100_000]
    names += [f"train/000000.tar::zip://{folder}/secret", "train/０００００.tar", "train\\000000.tar"]
    for name in names:
        yield f"shard named {name[:40]!r}", changed(shard_name(name))
    for name in ("../secret", f"{folder}/secret", f"pipe:touch {folder}/canary"):
        yield (
            f"table named {name[:40]!r}",
            changed(lambda value, name=name: value["splits"]["train"]["table"].update(name=name)),
        )
    yield "split named ../up", changed(lambda value: value["splits"].update({"../up": value["splits"].pop("train")}))
    yield "split of HTML", changed(lambda value: value["splits"].update({"<b>": value["splits"].pop("train")}))
    for number in (-1, 1e300, 10**30, "7", None, [], True):
        yield (
            f"samples {number!r}",
            changed(
                lambda value, number=number: value["splits"]["train"]["shards"][0].update(samples=number, bytes=number)
            ),
        )
        yield f"size {number!r}", changed(lambda value, number=number: value.update(size=number))
    yield "no splits", changed(lambda value: value.update(splits=[]))
    texts = {
        "nested": DEEP,
        "not a number": '{"format": NaN}',
        "a number of 10,000 digits": "9" * 10_000,
        "nothing": "",
        "NUL": "\0" * 1000,
        "pickle": "",
    }
    for name, text in texts.items():
        data = pickle.dumps(Bomb(folder / "canary")) if name == "pickle" else text.encode()

        def call(data: bytes = data) -> int:
            (root / format.INDEX_NAME).write_bytes(data)
            return read_all(root)

        yield f"index of {name}", call


def tables(root: Path, folder: Path) -> Iterator[Case]:
    """Sample tables whose hash the index has: pickles, promises of terabytes, offsets into nowhere."""
    path = root / format.table_name("train")
    good = np.load(path, allow_pickle=False)

    def stored(data: bytes) -> Callable[[], Any]:
        def call() -> int:
            path.write_bytes(data)
            entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            write_index(root, lambda value: value["splits"]["train"]["table"].update(entry))
            return read_all(root)

        return call

    def saved(array: np.ndarray, **options: Any) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, **options)
        return buffer.getvalue()

    def changed(column: str, value: Any) -> bytes:
        table = good.copy()
        table[column][0] = value
        return saved(table)

    def promising(header: str) -> bytes:
        text = header.encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text

    yield "pickled objects", stored(saved(np.array([Bomb(folder / "canary")], object), allow_pickle=True))
    descr = np.lib.format.dtype_to_descr(good.dtype)
    for shape in ("(10**13,)", f"({10**13},)", "(-1,)", "(1, 1)", "()", "__import__('os')"):
        header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n"
        yield f"shape {shape}", stored(promising(header))
    yield "a header that is nested", stored(promising("(" * 50_000))
    yield "a header that goes on for ever", stored(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{")
    yield "numbers", stored(saved(np.arange(9)))
    yield "another order of columns", stored(saved(repack_fields(good[list(reversed(good.dtype.names or ()))])))
    yield "no rows", stored(saved(good[:0]))
    yield "a shard that is not there", stored(changed("shard", 2**32 - 1))
    yield "an offset into nowhere", stored(changed("offset", 2**64 - 1))
    yield "members of gigabytes", stored(changed("size", (2**32 - 1,) * 4))
    yield "a key of ../secret", stored(changed("key", b"../secret"))
    yield "a key of HTML", stored(changed("key", b"<script>"))
    yield "a key with a NUL", stored(changed("key", b"a\0b"))


def members(root: Path, folder: Path) -> Iterator[Case]:
    """Members of a shard whose checksums are right: bombs, other formats, scripts."""
    split = ShardSet.open(root).split("train")
    shard = root / split.shards[0]
    row = int(np.flatnonzero(split.table["shard"] == 0)[0])

    def stored(member: int, data: bytes) -> Callable[[], Any]:
        def call() -> int:
            table, tar = split.table.copy(), bytearray(shard.read_bytes())
            start = len(tar)
            sizes = [1] * member + [len(data)] + [0] * (3 - member)
            spans = layout.member_spans(start, sizes)
            tar += bytes(spans[member][0] + len(data) - len(tar))
            tar[spans[member][0] :] = data
            offset = spans[member][0] - layout.member_spans(0, table["size"][row].tolist())[member][0]
            table["offset"][row] = offset
            table["size"][row, member], table["crc"][row, member] = len(data), zlib.crc32(data)
            for other in range(4):
                if other != member and table["size"][row, other]:
                    at, size = layout.member_spans(offset, table["size"][row].tolist())[other]
                    table["crc"][row, other] = zlib.crc32(bytes(tar[at : at + size]))
            shard.write_bytes(tar)
            np.save(root / format.table_name("train"), table)
            data_of_table = (root / format.table_name("train")).read_bytes()
            entry = {"bytes": len(data_of_table), "sha256": hashlib.sha256(data_of_table).hexdigest()}
            write_index(root, lambda value: value["splits"]["train"]["table"].update(entry))
            opened = ShardSet.open(root).split("train")
            return (opened.image, opened.meta, opened.mask)[member](row) is not None

        return call

    for name, data in pictures(folder):
        yield f"image: {name}", stored(format.IMAGE, data)
        yield f"mask: {name}", stored(format.MASK, data)
    for name, text in (("nested", DEEP), ("no JSON", "{"), ("10,000 digits", "9" * 10_000), ("not UTF-8", "\udcff")):
        yield f"JSON: {name}", stored(format.META, text.encode(errors="surrogateescape"))


def pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Bytes that are not the JPEG, PNG or BMP that their names say, or far more than they seem."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 0, rows: bytes = b"") -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        return (
            b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        )

    yield "PNG of 30,000 x 30,000", png(30_000, 30_000, depth=1, rows=bytes(3751) * 30_000)
    yield "PNG of 4 billion columns", png(2**31 - 1, 2**31 - 1)
    yield "PNG whose rows go on for gigabytes", png(64, 64, rows=bytes(300_000_000))
    yield "PNG with a text of 200 MB", png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000))))
    yield "PNG with a profile of 200 MB", png(64, 64, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000))))
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    frame = jpeg.getvalue().index(b"\xff\xc0") + 5
    yield (
        "JPEG of 65,500 x 65,500",
        jpeg.getvalue()[:frame] + struct.pack(">HH", 65_500, 65_500) + jpeg.getvalue()[frame + 4 :],
    )
    yield "JPEG that ends at once", jpeg.getvalue()[:20]
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    yield "EPS", f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({folder}/canary) (w) file closefile\n".encode()
    yield "pickle", pickle.dumps(Bomb(folder / "canary"))
    yield (
        "BMP of 2 billion rows",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 64, 2**31 - 1, 1, 24, 0, 0, 1, 1, 0, 0),
    )
    for kind in ("GIF", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64)).save(buffer, kind)
        yield kind, buffer.getvalue()


def sources(root: Path, folder: Path) -> Iterator[Case]:
    """Inputs of a build: pictures, and archives that lie, link, climb and explode."""
    from shards.build import BuildOptions, build

    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(good, "JPEG")
    mask = io.BytesIO()
    Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), 22)).save(mask, "PNG")

    def built(source: Path) -> Callable[[], Any]:
        def call() -> int:
            out = folder / "built"
            shutil.rmtree(out, ignore_errors=True)
            options = BuildOptions(size=32, split="train=1")
            return build(str(source), str(source), out, options, workers=1).index.counts.packed

        return call

    def archive(name: str, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
        path = folder / f"{name}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for entry, data in entries:
                file.writestr(entry, data)
        return path

    for number, (name, data) in enumerate(pictures(folder)):
        source = folder / f"source-{number}"
        source.mkdir()
        (source / "A.jpg").write_bytes(data)
        (source / "A_segmentation.png").write_bytes(mask.getvalue())
        yield f"image: {name}", built(source)
    link = zipfile.ZipInfo("A.jpg")
    link.external_attr = 0o120777 << 16
    pair = ("A_segmentation.png", mask.getvalue())
    yield "zip with a link", built(archive("link", (link, f"{folder}/secret".encode()), pair))
    yield (
        "zip that climbs",
        built(archive("climbs", ("../../A.jpg", good.getvalue()), ("../A_segmentation.png", mask.getvalue()))),
    )
    yield "zip with absolute names", built(archive("absolute", (f"{folder}/canary/A.jpg", good.getvalue()), pair))
    yield "zip with a bomb", built(archive("bomb", ("A.jpg", bytes(400_000_000)), pair))
    lying = archive("lying", ("A.jpg", bytes(400_000_000)), pair)
    data = lying.read_bytes().replace(struct.pack("<I", 400_000_000), struct.pack("<I", 1000))
    lying.write_bytes(data)
    yield "zip that lies about a size", built(lying)
    yield (
        "zip with a key of HTML",
        built(archive("html", ("<script>.jpg", good.getvalue()), ("<script>_segmentation.png", mask.getvalue()))),
    )
    (folder / "torn.zip").write_bytes(archive("whole", ("A.jpg", good.getvalue()), pair).read_bytes()[:-40])
    yield "zip that is cut short", built(folder / "torn.zip")


def models(root: Path, folder: Path) -> Iterator[Case]:
    """Best models and checkpoints with right hashes: pickles, headers that promise, JSON that explodes."""
    from isicdist.config import ModelConfig
    from isicdist.network.best import METADATA_NAME, MODEL, ModelMetadata, ValidationScore, load_best, save_best
    from isicdist.network.unet import ImprovedUNet
    from isicdist.network.weights import file_sha256
    from isicdist.training import checkpoint
    from tests.isicdist.training.test_checkpoint import save

    config = ModelConfig(base_channels=2)
    metadata = ModelMetadata.of(config, ShardSet.open(root), step=1, score=ValidationScore(mean_dice=0.5))
    save_best(folder / "run", ImprovedUNet(base_channels=2), metadata)
    best = folder / "run" / "best"
    good, card = (best / MODEL).read_bytes(), (best / METADATA_NAME).read_bytes()
    header_bytes = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + header_bytes])
    name = max(header.keys() - {"__metadata__"}, key=lambda key: header[key].get("data_offsets", [0])[-1])

    def framed(value: Any) -> bytes:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + header_bytes :]

    def weights(data: bytes) -> Callable[[], Any]:
        def call() -> int:
            (best / MODEL).write_bytes(data)
            value = {**json.loads(card), "sha256": file_sha256(best / MODEL)}
            del value["checksum"]
            (best / METADATA_NAME).write_text(json.dumps(value))
            return load_best(best)[1].step

        return call

    def changed(**change: Any) -> Callable[[], Any]:
        return weights(framed({**header, name: {**header[name], **change}}))

    yield "weights: pickle", weights(pickle.dumps(Bomb(folder / "canary")))
    yield "weights: a header of exabytes", weights(struct.pack("<Q", 2**60) + good[8:])
    yield "weights: a nested header", weights(framed(DEEP.encode()))
    yield "weights: terabytes", changed(shape=[10**6, 10**6], data_offsets=[0, 4 * 10**12])
    yield "weights: overlapping", changed(data_offsets=[0, 8])
    yield "weights: backwards", changed(data_offsets=[8, 0])
    yield "weights: half of a tensor", changed(shape=[1], data_offsets=[header[name]["data_offsets"][0]] * 2)
    yield "weights: another type", changed(dtype="F128")
    yield "weights: cut short", weights(good[: len(good) // 2])

    def cards(text: bytes) -> Callable[[], Any]:
        def call() -> int:
            (best / MODEL).write_bytes(good)
            (best / METADATA_NAME).write_bytes(text)
            return load_best(best)[1].step

        return call

    yield "model.json: nested", cards(DEEP.encode())
    yield "model.json: a list", cards(b"[]")
    yield "model.json: 10,000 digits", cards(b"9" * 10_000)
    value = json.loads(card)
    del value["checksum"]
    for change in (
        {"size": 2**62},
        {"architecture": {"base_channels": 10**6}},
        {"fit": "../secret"},
        {"mean": [1e999] * 3},
    ):
        yield f"model.json: {change}"[:60], cards(json.dumps({**value, **change}).encode())

    save(folder / "trained", 1)
    newest = folder / "trained" / "checkpoints" / "step-00000001"
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}

    def replaced(changes: dict[str, bytes]) -> Callable[[], Any]:
        def call() -> int:
            for file, data in {**whole, **changes}.items():
                (newest / file).write_bytes(data)
            if checkpoint.MANIFEST not in changes:
                hashes = {file: file_sha256(newest / file) for file in checkpoint.HASHED_FILES}
                (newest / checkpoint.MANIFEST).write_text(json.dumps(hashes))
            return checkpoint.load(newest).state["step"]

        return call

    yield "optimizer: pickle", replaced({checkpoint.OPTIMIZER: pickle.dumps(Bomb(folder / "canary"), protocol=2)})
    yield "optimizer: nothing", replaced({checkpoint.OPTIMIZER: b""})
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(400_000_000))
    yield "optimizer: a zip bomb", replaced({checkpoint.OPTIMIZER: bomb.getvalue()})
    yield "state: nested", replaced({checkpoint.STATE: DEEP.encode()})
    yield "manifest: nested", replaced({checkpoint.MANIFEST: DEEP.encode()})
    yield "manifest: names elsewhere", replaced({checkpoint.MANIFEST: json.dumps({"../secret": "0"}).encode()})


def configs(root: Path, folder: Path) -> Iterator[Case]:
    """Config files: TOML that explodes, values of other types."""
    from isicdist.settings_file import load_file

    texts = {
        "nested": "epochs = " + "[" * 100_000,
        "nested tables": "a = " + "{b = " * 50_000,
        "10,000 digits": "epochs = " + "9" * 10_000,
        "dotted for ever": ".".join(["a"] * 50_000) + " = 1",
        "a word of 90,000 letters": "a" * 90_000,
        "not UTF-8": "\udcff",
        "unknown section": "[__class__]\nx = 1",
    }
    for name, text in texts.items():
        path = folder / "config.toml"

        def call(path: Path = path, text: str = text) -> Any:
            path.write_bytes(text.encode(errors="surrogateescape"))
            return load_file(path)

        yield f"TOML: {name}", call


KINDS = {
    "indexes": indexes,
    "tables": tables,
    "members": members,
    "sources": sources,
    "models": models,
    "configs": configs,
}


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """Open one file: how it ended. Any other error than ours is not caught."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        ended = {"read": str(call())[:100]}
    except ToolkitError as error:
        ended = {"refused": type(error).__name__, "message": str(error)}
    return {**ended, "grown": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def main() -> None:
    """Open the files of a kind."""
    kind, whole, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    root = folder / "set"
    for name, call in KINDS[kind](Path(shutil.copytree(whole, root)), folder):
        print(json.dumps({"name": name, **outcome(call)}), flush=True)
        shutil.rmtree(root)
        shutil.copytree(whole, root)


if __name__ == "__main__":
    main()
