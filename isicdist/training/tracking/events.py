"""Events of a run, training metrics and evaluation scores, and the protocol of the sinks that log them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

if TYPE_CHECKING:
    import numpy as np

    from isicdist.metrics.examples import Example
    from isicdist.metrics.thresholds import ThresholdCurve

RunState = Literal["finished", "stopped", "failed"]
"""How a run ended: all steps trained, stopped by a signal with a checkpoint saved, or with an error."""


@dataclass(frozen=True, kw_only=True)
class _Event:
    event: ClassVar[str]
    """Value of the key `event` in metrics.jsonl."""

    def to_json(self) -> dict[str, Any]:
        """Return the event as metrics.jsonl holds it; JSON has no NaN and no infinity, so they become null."""
        return {"event": self.event, **{name: _finite_or_none(value) for name, value in self.measured().items()}}

    def measured(self) -> dict[str, Any]:
        """Return the values by name, without those that this run does not measure."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read an event of metrics.jsonl; null becomes NaN, unknown keys are ignored.

        Raises TypeError where a key is missing.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name in values]
        return cls(**{name: math.nan if values[name] is None else values[name] for name in names})


@dataclass(frozen=True, kw_only=True)
class TrainMetrics(_Event):
    """Metrics of one logged training step."""

    event = "train"
    step: int
    """Optimizer updates made so far."""
    epoch: int
    """Epoch of this step, from 0."""
    samples: int
    """Samples trained on so far, in all epochs and on all ranks."""
    loss: float
    """Mean over the global batches since the last logged step whose update was made; NaN if there is none."""
    pooled_dice: float
    """Dice of the training predictions since the last logged step, pixels pooled, 0 to 1."""
    lr: float
    """Learning rate of this step."""
    grad_norm: float
    """L2 norm of the global batch's gradient, before clipping; may be infinite or NaN."""
    images_per_s: float
    """Throughput of all ranks together since the last logged step, in images per second, without evaluations."""
    data_wait: float
    """Share of that time spent waiting for a batch, 0 to 1."""
    skipped: int = 0
    """Steps since the last logged one whose update was skipped: loss or gradient not finite."""
    memory_bytes: int = 0
    """Peak memory of rank 0 so far: reserved on its GPU, or resident of its process on a CPU; 0 in an old log."""
    loss_scale: float | None = None
    """Factor of the loss under fp16, which the gradient scaler adapts; None without a scaler."""


@dataclass(frozen=True, kw_only=True)
class EvaluationMetrics(_Event):
    """Scores of one evaluation of a whole split, as `isicdist.metrics.dice.DiceSummary` defines them."""

    event = "evaluate"
    step: int
    """Optimizer updates made before the evaluation."""
    split: str
    """Name of the split."""
    n: int
    """Images evaluated."""
    mean_dice: float
    """Mean Dice over images, 0 to 1."""
    pooled_dice: float
    """Dice of all pixels pooled, 0 to 1."""
    mean_jaccard: float
    """Mean Jaccard over images, 0 to 1."""
    thresholded_jaccard: float
    """Mean Jaccard over images, those below 0.65 counted as 0; 0 to 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationDetails:
    """Everything about one evaluation that dashboards draw and metrics.jsonl does not hold."""

    epoch: int | None = None
    """Epoch that the next step belongs to, from 0; None for an evaluation after training."""
    samples: int | None = None
    """Samples trained on before the evaluation, in all epochs and on all ranks; None for one after training."""
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further scores by name, such as average_precision."""
    dice: np.ndarray
    """Dice of each image, float64 (n,)."""
    curve: ThresholdCurve
    """Pooled scores at every threshold."""
    examples: Sequence[Example]
    """Images with ground truth and prediction, in groups: fixed and worst in training, worst, median and best after."""

    def grouped(self) -> dict[str, list[Example]]:
        """Return the examples by the name of their group, in order."""
        groups: dict[str, list[Example]] = {}
        for example in self.examples:
            groups.setdefault(example.group, []).append(example)
        return groups


Details = Callable[[], EvaluationDetails]
"""Makes the details of an evaluation; only a dashboard calls it, since it predicts images."""
Note = Callable[[str], None]
"""Prints one line on the console."""


class Sink(Protocol):
    """Receives the events of a run; a sink subclasses it and overrides the methods it has a use for."""

    def truncate_after(self, step: int, *, evaluated: bool = True) -> None:
        """Forget the events of steps later than `step`, and without `evaluated` also the evaluations of `step`."""

    def log_train(self, metrics: TrainMetrics) -> None:
        """Log one training step."""

    def log_evaluation(self, metrics: EvaluationMetrics, details: Details | None = None) -> None:
        """Log one evaluation of a split."""

    def log_progress(self, split: str, done: int, total: int) -> None:
        """Show that `done` of the `total` images of a split have been evaluated."""

    def log_checkpoint(self, step: int) -> None:
        """Show that the checkpoint of `step` has been written; the thread that wrote it calls."""

    def note(self, text: str) -> None:
        """Log one line of text for the person who watches the run."""

    def close(self, state: RunState) -> None:
        """Flush and release everything; a second call does nothing."""


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
