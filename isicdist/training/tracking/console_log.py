"""Log to the console: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from isicdist.training.tracking.events import EvaluationMetrics, RunState, Sink, TrainMetrics


class ConsoleLog(Sink):
    """Prints notes and evaluations as lines; training steps move a progress bar on a terminal, else are lines too."""

    def __init__(self, console: Console, *, total_steps: int) -> None:
        """Print to `console`; training ends at step `total_steps`."""
        self._console = console
        self._total_steps = total_steps
        self._progress: Progress | None = None

    def start_progress(self) -> None:
        """Show the progress bar, if the console is a terminal."""
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self._console,
            refresh_per_second=2,  # the bar's thread shares the GIL with the training loop
        )
        self._progress.add_task("train", total=self._total_steps, epoch=0, metrics="")
        self._progress.start()

    def truncate_after(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self._progress is not None:
            self._progress.reset(self._progress.task_ids[0], completed=step)

    def log_train(self, metrics: TrainMetrics) -> None:
        """Move the progress bar, or print a line."""
        m = metrics
        if self._progress is not None:
            text = f"loss {m.loss:.4f}  dice {m.pooled_dice:.3f}  {m.images_per_s:.0f} img/s  wait {m.data_wait:.0%}"
            self._progress.update(self._progress.task_ids[0], completed=m.step, epoch=m.epoch, metrics=text)
        else:
            self.note(
                f"step {m.step}/{self._total_steps}  epoch {m.epoch}  loss {m.loss:.4f}"
                f"  pooled dice {m.pooled_dice:.4f}  lr {m.lr:.2e}  grad norm {m.grad_norm:.3g}"
                f"  {m.images_per_s:.1f} images/s  wait {m.data_wait:.0%}"
            )
        if m.skipped:
            self.note(f"step {m.step}: {m.skipped} updates were skipped: loss or gradient not finite")

    def log_evaluation(self, metrics: EvaluationMetrics) -> None:
        """Print the scores in one line."""
        m = metrics
        self.note(
            f"step {m.step}  {m.split} ({m.n} images)  mean dice {m.mean_dice:.4f}  pooled dice {m.pooled_dice:.4f}"
            f"  mean jaccard {m.mean_jaccard:.4f}  thresholded jaccard {m.thresholded_jaccard:.4f}"
        )

    def note(self, text: str) -> None:
        """Print one line, above the progress bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, state: RunState) -> None:
        """Stop the progress bar; lines can still be printed."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
