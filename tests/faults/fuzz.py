"""Coverage-guided fuzzing of every reader of files: only our error types (and those a docstring names), no hang.

    python -m tests.faults.fuzz TARGET FOLDER -max_total_time=60    with what libFuzzer takes; new inputs go to FOLDER
    python -m tests.faults.fuzz --seed                              write the first inputs to tests/faults/corpus/

`pip install atheris` (the extra `fuzz`). `test_fuzz.py` reads the corpus again in `make test`, and `make test-faults`
goes on from it. An input that finds an error belongs in the corpus, under a name that says what it is.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from PIL import Image

from isicdist.errors import CheckpointError
from isicdist.network.best import METADATA_NAME, MODEL, load_metadata
from isicdist.network.weights import load_weights
from isicdist.settings_file import parse_settings
from isicdist.training.tracking.metrics_file import read_metrics
from shards import codecs, format
from shards.errors import ShardSetError, SourceError, ToolkitError
from shards.inputs.binary_png import decode_binary_png
from shards.inputs.decode import BadPairError, load_image
from shards.inputs.headers import plain_jpeg, plain_png
from shards.inputs.masks import MaskValueError, read_mask
from shards.inputs.source import File, ZipSource
from shards.tables import read_column

CORPUS = Path(__file__).parent / "corpus"
INSTRUMENTED = {"shards", "isicdist", "tomllib", "zipfile", "csv"}
"""Packages whose branches guide the fuzzer."""
PICTURE_ERRORS = (OSError, ValueError, SyntaxError)
"""What `shards.codecs` says that it raises."""


def expect(kinds: type[Exception] | tuple[type[Exception], ...], call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a reader: what it read, or None where it refused the input as its docstring says."""
    try:
        return call(*arguments)
    except kinds:
        return None


def in_file(kinds: type[Exception] | tuple[type[Exception], ...], read: Callable[[Path], Any], data: bytes) -> None:
    """As `expect`, for a reader of a file."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(data)
        file.flush()
        expect(kinds, read, Path(file.name))


def index(data: bytes) -> None:
    """index.json as it is, and with the digest that an attacker would compute."""
    expect(ShardSetError, format.Index.parse, data, "index.json")
    value = expect(ValueError, format.parse_json, data)
    if isinstance(value, dict):
        try:
            text = format.canonical_json({**value, "digest": format.digest_of(value)})
        except (RecursionError, ValueError):  # nested more deeply than it can be written
            return
        expect(ShardSetError, format.Index.parse, text, "index.json")


def table(data: bytes) -> None:
    """A sample table."""
    rows = expect(ValueError, format.parse_table, data, 3)
    if rows is not None:
        assert all(int(row["shard"]) < 3 and row["key"] for row in rows)


def jpeg(data: bytes) -> None:
    """A member of a shard, a photograph of a build, and their headers."""
    pixels = expect(PICTURE_ERRORS, codecs.decode_image, data)
    assert pixels is None or pixels.shape[2] == 3
    size = plain_jpeg(data)
    if size and pixels is not None:
        assert size == (pixels.shape[1], pixels.shape[0])
    expect((BadPairError, ToolkitError), load_image, File(0, "A.jpg", len(data)), [InMemory(data)], "stretch", 32)


def png(data: bytes) -> None:
    """Masks: 5 bytes of header and then rows that are compressed here, for no fuzzer finds a CRC-32."""
    if len(data) < 5:
        return
    width, height, depth, colour, chunked = data[0] + 1, data[1] % 64 + 1, 1 << data[2] % 5, data[3] % 8, data[4]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, chunked >> 7)
    body = zlib.compress(data[5:])
    bodies = [body] if chunked % 2 else [body[:9], b"", body[9:]]
    chunks = [(b"IHDR", header), *((b"IDAT", each) for each in bodies), (b"IEND", b"")]
    picture = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)
    mask(picture)
    mask(data)


def mask(data: bytes) -> None:
    """A mask by each of its readers; where ours reads a PNG, Pillow reads the same."""
    stored = expect(PICTURE_ERRORS, codecs.decode_mask, data)
    assert stored is None or stored.max(initial=0) <= 1
    plain_png(data)
    binary = expect((), decode_binary_png, data)
    if binary is not None:
        with Image.open(io.BytesIO(data)) as picture:
            assert np.array_equal(np.asarray(picture), binary)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.width * picture.height < 10**6:
                read_mask(picture, binary)
    except (*PICTURE_ERRORS, MaskValueError):
        pass


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, with its CRC-32."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


class InMemory:
    """A source of one file."""

    location = "memory"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def files(self, source: int) -> list[File]:
        return [File(source, "A.jpg", len(self.data))]

    def read(self, name: str) -> bytes:
        return self.data

    def close(self) -> None:
        pass


def archive(data: bytes) -> None:
    """A zip of photographs: listed, and read as far as it says."""

    def read(path: Path) -> None:
        source = ZipSource(str(path))
        try:
            for file in source.files(0)[:4]:
                if file.size < 10**6:
                    expect((BadPairError, ToolkitError), load_image, file, [source], "stretch", 32)
        finally:
            source.close()

    in_file(SourceError, read, data)


def model(data: bytes) -> None:
    """model.json of a best model."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        (Path(folder) / METADATA_NAME).write_bytes(data)
        (Path(folder) / MODEL).touch()
        expect(CheckpointError, load_metadata, folder)


def weights(data: bytes) -> None:
    """A state dict in safetensors."""
    from safetensors import SafetensorError

    in_file((OSError, SafetensorError), load_weights, data)


def metrics(data: bytes) -> None:
    """metrics.jsonl of a run."""
    in_file(CheckpointError, read_metrics, data)


def config(data: bytes) -> None:
    """A TOML file of settings."""
    expect(ToolkitError, parse_settings, data.decode(errors="replace"), "config.toml")


def column(data: bytes) -> None:
    """A CSV of metadata."""
    in_file(ToolkitError, lambda path: read_column(path, "lesion", "--groups"), data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (index, table, jpeg, png, mask, archive, model, weights, metrics, config, column)
}


def seeds(shard_set: Path) -> dict[str, list[bytes]]:
    """First inputs of each target, valid ones."""
    import zipfile

    from isicdist.config import ModelConfig
    from isicdist.network.best import ModelMetadata, ValidationScore
    from shards.reader import ShardSet

    opened = ShardSet.open(shard_set)
    small = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    pictures: list[bytes] = []
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}):
        buffer = io.BytesIO()
        Image.fromarray(small).save(buffer, "JPEG", **options)
        pictures.append(buffer.getvalue())
    masks = [codecs.encode_mask(small[..., 0] > 128)]
    for picture in (Image.fromarray(small[..., 0] // 128 * 255), Image.fromarray(small[..., 0] > 128)):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        masks.append(buffer.getvalue())
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("A.jpg", pictures[0])
        file.writestr("a/A_segmentation.png", masks[0])
    card = ModelMetadata.of(ModelConfig(base_channels=2), opened, step=1, score=ValidationScore(mean_dice=0.5))
    tensors = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    events = [
        {"event": "train", "step": 1, "epoch": 0, "samples": 8, "loss": 0.5, "pooled_dice": 0.2, "lr": 1e-3}
        | {"grad_norm": 1.0, "images_per_s": 9.0, "data_wait": 0.0, "skipped": 0, "memory_bytes": 1},
        {"event": "evaluate", "step": 1, "split": "val", "n": 3, "mean_dice": 0.8, "pooled_dice": 0.7}
        | {"mean_jaccard": 0.6, "thresholded_jaccard": 0.5},
    ]
    return {
        "index": [(shard_set / format.INDEX_NAME).read_bytes()],
        "table": [(shard_set / format.table_name("val")).read_bytes()],
        "jpeg": pictures,
        "png": [bytes((7, 3, kind, 0, 1)) + bytes(9) + bytes(range(4)) * 9 for kind in (0, 3)],
        "mask": masks,
        "archive": [zipped.getvalue()],
        "model": [json.dumps(card.to_json()).encode()],
        "weights": [struct.pack("<Q", len(tensors)) + tensors + bytes(8)],
        "metrics": ["".join(json.dumps(event) + "\n" for event in events).encode()],
        "config": [b'epochs = 9\n[optim]\nlr = 1e-3\nschedule = "poly"\n[augment]\nscale = [0.5, 2.0]\n'],
        "column": [b"image,lesion\nISIC_0000000,a\n", b'\xef\xbb\xbfisic_id;lesion\r\nISIC_1;"a"\r\n'],
    }


def main() -> None:
    """Fuzz one target, or write the first inputs."""
    if sys.argv[1] == "--seed":
        for name, inputs in seeds(Path(__file__).parent.parent / "golden" / "set").items():
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            for number, data in enumerate(inputs):
                (CORPUS / name / f"seed-{number}").write_bytes(data)
        return
    atheris: Any = importlib.import_module("atheris")  # an extra
    target = TARGETS[sys.argv.pop(1)]
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__module__ and each.__module__.partition(".")[0] in INSTRUMENTED:
            atheris.instrument_func(each)
    atheris.Setup([*sys.argv, str(CORPUS / target.__name__)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
