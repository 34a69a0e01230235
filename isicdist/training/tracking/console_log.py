"""Log to a file, a pipe or a SLURM log: one line per event, without control characters."""

from __future__ import annotations

import io

from rich.console import Console

from isicdist.training.tracking.events import Details, EvaluationMetrics, Sink, TrainMetrics


class ConsoleLog(Sink):
    """Prints notes, training steps and evaluations as lines; on a terminal, `LiveDisplay` does."""

    def __init__(self, console: Console, *, total_steps: int) -> None:
        """Print to `console`; training ends at step `total_steps`."""
        self.console = console
        self.total_steps = total_steps
        if isinstance(console.file, io.TextIOWrapper) and console.file.errors == "strict":
            # An ASCII locale prints escapes, as on stderr, and goes on.
            console.file.reconfigure(errors="backslashreplace")

    def start(self) -> None:
        """Start the display, if there is one."""

    def log_train(self, metrics: TrainMetrics) -> None:
        """Print the metrics in one line."""
        m = metrics
        self.note(
            f"step {m.step}/{self.total_steps}  epoch {m.epoch}  loss {m.loss:.4f}"
            f"  pooled dice {m.pooled_dice:.4f}  lr {m.lr:.2e}  grad norm {m.grad_norm:.3g}"
            f"  {m.images_per_s:.1f} images/s  wait {m.data_wait:.0%}"
        )
        self.note_skipped(m)

    def note_skipped(self, metrics: TrainMetrics) -> None:
        """Print a line if updates were skipped."""
        if metrics.skipped:
            self.note(f"step {metrics.step}: {metrics.skipped} updates were skipped: loss or gradient not finite")

    def log_evaluation(self, metrics: EvaluationMetrics, details: Details | None = None) -> None:
        """Print the scores in one line."""
        m = metrics
        self.note(
            f"step {m.step}  {m.split} ({m.n} images)  mean dice {m.mean_dice:.4f}  pooled dice {m.pooled_dice:.4f}"
            f"  mean jaccard {m.mean_jaccard:.4f}  thresholded jaccard {m.thresholded_jaccard:.4f}"
        )

    def note(self, text: str) -> None:
        """Print one line, above the live display where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
