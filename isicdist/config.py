"""Settings of a training run: frozen dataclasses that document, check and default every value.

The same names, nested by section, are the keys of a recipe's TOML and the flags of `isicdist train`
(`[batch] global_size` is `--batch.global-size`). A flag wins over `--config` or `--recipe`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from shards.errors import UsageError

Range = tuple[float, float]
Precision = Literal["no", "bf16", "fp16"]
"""Mixed precision by accelerate's names; no: float32."""
Tta = Literal["off", "flips", "d4"]
"""Test-time augmentation: off, over the two flips and their product, or over all 8 symmetries of the square."""
Schedule = Literal["one-cycle", "paper"]
"""Learning-rate schedule: one-cycle (warm-up, then cosine decay) or the paper's."""
TrackerName = Literal["wandb", "tensorboard", "trackio", "none"]
"""Dashboard that shows a run; none: no dashboard."""


MAX_GLOBAL_SIZE = 1_000_000
MAX_TIMEOUT = 31 * 24 * 3600
RENAMED_SETTINGS = {"augment.small_share": "augment.progressive_resize_fraction", "max_skipped": "max_nonfinite_steps"}
"""Settings of version 0.1 by their names of today: in the records of older runs."""


def _require(holds: bool, name: str, value: object, hint: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}: {hint}")


def _require_range(name: str, value: Range) -> None:
    low, high = value
    _require(0 < low <= high < math.inf, name, value, "give two positive numbers, the smaller one first")


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One of the folds of a cross-validation, written K/N."""

    number: int
    """Number of the fold, from 1."""
    count: int
    """Number of folds."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse K/N, as 2/5. Raises UsageError."""
        match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        _require(1 <= number <= count >= 2, "fold", text, "write K/N with K from 1 to N and at least 2 folds, as 2/5")
        return cls(number=number, count=count)

    @classmethod
    def of_split(cls, name: str) -> Self | None:
        """Read the `name` of held-out images, as fold_2_of_5; None for the name of another split."""
        match = re.fullmatch(r"fold_([0-9]{1,4})_of_([0-9]{1,4})", name)
        return cls.parse("/".join(match.groups())) if match else None

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """Name of the held-out images as a split, also of a folder: fold_2_of_5."""
        return f"fold_{self.number}_of_{self.count}"

    @property
    def all(self) -> list[Self]:
        """All folds of the cross-validation, in order."""
        return [dataclasses.replace(self, number=number) for number in range(1, self.count + 1)]

    @property
    def run_name(self) -> str:
        """Name of its run in the folder of a cross-validation: fold-2."""
        return f"fold-{self.number}"


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Batch sizes: the global batch decides the result, the micro batch memory and speed only."""

    global_size: int = 16
    """Samples of one optimizer step over all processes (global batch)."""
    micro_size: int | Literal["auto"] = "auto"
    """Samples of one forward pass on one process; gradient accumulation follows from it. auto: the whole share of the
    global batch (on a CPU at most 2^20 pixels), halved whenever a process runs out of memory (OOM)."""

    def __post_init__(self) -> None:
        most = MAX_GLOBAL_SIZE
        _require(
            1 <= self.global_size <= most, "batch.global_size", self.global_size, f"give a number from 1 to {most}"
        )
        if self.micro_size != "auto":
            _require(self.micro_size >= 1, "batch.micro_size", self.micro_size, "give a number from 1, or auto")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Data loading: reading, decoding, shuffling, caches."""

    workers: int | Literal["auto"] = "auto"
    """Threads per process that decode samples; auto: 2 beside a CPU that trains, the process's share of the machine's
    cores beside a GPU, at most 8."""
    prefetch: int = 2
    """Micro batches that are decoded ahead (prefetch)."""
    window: int = 0
    """Shuffle window in shards; 0: the whole set where shards are local, 16 shards of a set behind a URL, which must
    all be cached at once."""
    cache_size: int = 0
    """Bytes of shards behind a URL that are kept on each node, at least those of two windows; 0: all of them. They
    lie in the cache folder: $ISICDIST_CACHE, else ~/.cache/isicdist, or a folder in $SLURM_TMPDIR or $TMPDIR where that
    is on a network file system."""
    decoded_cache: str = "auto"
    """Folder that caches decoded samples, so that from the second epoch on none is decoded; or auto, or off. auto:
    below the cache folder, if it can be written and they take at most a quarter of the memory and half of what is free
    on the disk."""

    def __post_init__(self) -> None:
        if self.workers != "auto":
            _require(self.workers >= 1, "stream.workers", self.workers, "at least 1 thread must decode; or give auto")
        _require(self.prefetch >= 1, "stream.prefetch", self.prefetch, "at least 1 micro batch is read ahead")
        _require(self.window >= 0, "stream.window", self.window, "give a number of shards, or 0 for all")
        _require(self.cache_size >= 0, "stream.cache_size", self.cache_size, "give a number of bytes, or 0 for all")
        _require(self.decoded_cache != "", "stream.decoded_cache", "empty", "give auto, off or a folder")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Improved UNet."""

    base_channels: int = 16
    """Filters at full resolution; doubled at each of the four levels below."""
    dropout: float = 0.3
    """Dropout probability in each context module, from 0 to below 1."""
    deep_supervision: bool = True
    """Deep supervision: add the heads at quarter and half resolution to the full one."""

    def __post_init__(self) -> None:
        _require(self.base_channels >= 1, "model.base_channels", self.base_channels, "at least 1; the paper has 16")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a share from 0 to below 1; the paper has 0.3")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer (Adam), learning rate and loss."""

    lr: float = 2e-3
    """Peak learning rate."""
    schedule: Schedule = "one-cycle"
    """Learning-rate schedule: one-cycle (warm-up, then cosine decay) or the paper's lr x 0.985^epoch."""
    weight_decay: float = 2e-5
    """Coupled L2 (twice the paper's 1e-5 x sum of squares), not on biases and norms."""
    clip_norm: float = 12.0
    """Gradient clipping: maximum norm of a step's gradient; 0: no clipping."""
    bce_weight: float = 0.5
    """Weight of the binary cross-entropy beside the soft Dice loss."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average (EMA) of the weights, at most (1 + step) / (10 + step). The average is
    evaluated and saved as RUN/best; 0: the weights themselves."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", self.lr, "give a positive rate, such as 2e-3")
        _require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "give a share from 0 to below 1: 0.99")
        for name in ("weight_decay", "clip_norm", "bce_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"optim.{name}", value, "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of the training images, on their device, per sample.

    A lesion has no upside: each image is mirrored and turned to one of the 8 symmetries of the square, too.
    """

    enabled: bool = True
    """Augment training images."""
    progressive_resize_fraction: float = 0.0
    """Progressive resizing: fraction of the run's steps, the first ones, that train on images of three quarters of the
    side, in 0.6 of the time (Tan and Le, arXiv:2104.00298, section 4)."""
    rotation: float = 45.0
    """Maximum rotation either way in addition to quarter turns, in degrees; 45: any angle."""
    scale: Range = (0.75, 1.25)
    """Range of the zoom factor."""
    elastic: float = 0.03
    """Standard deviation of the elastic displacement, as a share of the side."""
    contrast: Range = (0.75, 1.5)
    """Range of the contrast factor around the image's mean."""
    gamma: Range = (0.8, 1.5)
    """Range of gamma, the exponent of the intensity."""
    brightness: float = 0.1
    """Maximum shift of the intensity either way; the whole range is 1."""
    hue: float = 0.0
    """Maximum hue rotation either way, in degrees; the paper has none."""
    saturation: Range = (1.0, 1.0)
    """Range of the saturation factor; the paper has none."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.progressive_resize_fraction < 1,
            "augment.progressive_resize_fraction",
            self.progressive_resize_fraction,
            "give a share from 0 to below 1",
        )
        for name in ("scale", "contrast", "gamma", "saturation"):
            _require_range(f"augment.{name}", getattr(self, name))
        _require(0 <= self.rotation <= 180, "augment.rotation", self.rotation, "give degrees from 0 to 180")
        _require(0 <= self.elastic <= 0.2, "augment.elastic", self.elastic, "give a share of the side from 0 to 0.2")
        _require(0 <= self.brightness <= 1, "augment.brightness", self.brightness, "give a shift from 0 to 1")
        _require(0 <= self.hue <= 180, "augment.hue", self.hue, "give degrees from 0 to 180")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    seed: int = 0
    """Random seed."""
    fold: str = ""
    """Cross-validation fold K/N, as 2/5: hold out fold K of the N that the images of train and val are dealt into, and
    train on the others. Empty: train on train, validate on val."""
    epochs: int = 12
    """Epochs: passes over the training split."""
    steps: int = 0
    """Maximum number of steps; 0: no limit but `epochs`."""
    eval_every: int = 0
    """Steps between evaluations of the validation split; 0: after each epoch."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: after each epoch."""
    checkpoint_min_seconds: int = 0
    """Minimum seconds between two checkpoints, for epochs that a fast GPU ends in seconds; the last one is always
    saved."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network with torch.compile (inductor); auto: on a GPU, not on a CPU. On an H200 a step of 64 images
    of 256 x 256 took 0.72 of its time, and the first one 25 to 40 s. A resumed run equals the uninterrupted one to
    rounding then, not bit for bit."""
    patience: int = 0
    """Early stopping: stop after this many evaluations without improvement of the mean Dice; 0: never."""
    max_nonfinite_steps: int = 10
    """Maximum consecutive steps that are skipped because loss or gradient is not finite; one more ends the run."""
    timeout: int = 600
    """Timeout of collectives in seconds: a process that waits that long for another one ends; longer than any step."""
    keep: int = 2
    """Number of checkpoints to keep, the newest ones."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest valid checkpoint of the run; never: refuse a run that has one."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    tracker: tuple[TrackerName, ...] = ("wandb",)
    """Dashboards that show the run, one or several (--tracker wandb tensorboard), or none. tensorboard and trackio are
    installed by the extras of these names."""
    log_model: Literal["none", "best"] = "none"
    """best: log RUN/best to wandb as an artifact when the run ends, with its metadata."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """The batch."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """Reading and decoding."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and loss."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, "seed", self.seed, "give a number from 0 to below 2^63")
        if self.fold:
            Fold.parse(self.fold)
        for name in ("epochs", "keep", "log_every", "timeout"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        _require(self.timeout <= MAX_TIMEOUT, "timeout", self.timeout, f"give at most {MAX_TIMEOUT}, which is a month")
        once = 1 <= len(self.tracker) == len(set(self.tracker)) and (
            "none" not in self.tracker or len(self.tracker) == 1
        )
        _require(once, "tracker", " ".join(self.tracker) or "empty", "name each dashboard once, or none alone")
        for name in ("patience", "max_nonfinite_steps", "checkpoint_min_seconds"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        for name in ("steps", "eval_every", "checkpoint_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give a number of steps, or 0")

    def to_json(self) -> dict[str, Any]:
        """Give the resolved config as plain values, nested by section."""
        return dataclasses.asdict(self)


def precision_name(mixed_precision: str) -> str:
    """Name a precision of accelerate as people do: float32, bf16 or fp16."""
    return "float32" if mixed_precision == "no" else mixed_precision


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a config to dotted names; settings of version 0.1 get the names of today."""
    return {RENAMED_SETTINGS.get(name, name): value for name, value in _flat(config, "")}


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield f"{prefix}{name}", value
