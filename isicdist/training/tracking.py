"""What a run writes down about itself: metrics.jsonl, the console and wandb. Only the main process does.

The training loop calls one `Tracker` on every rank; on the ranks that are not main each method returns at
once, so the loop has no `if is_main`. `metrics.jsonl` is the record. The console and wandb are views of it:
whatever fails in wandb is said in one line, and training goes on.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from isicdist.errors import TrainingError
from shards.files import write_file

if TYPE_CHECKING:
    import wandb

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb-id"

State = Literal["finished", "stopped", "failed"]

_WANDB_INIT_TIMEOUT = 20.0  # seconds, for a cluster node that is logged in but has no way out
_WANDB_FINISH_TIMEOUT = 60.0  # seconds; what is not uploaded by then stays in RUN/wandb for `wandb sync`


class Tracker:
    """The metrics of one run, from `open` to `close`. Use it as a context manager."""

    def __init__(self, run: Path, *, main: bool, total_steps: int | None, console: Console) -> None:
        """See `open`, which is how to make one."""
        self._run = run
        self._main = main
        self._console = console
        self._metrics: int | None = None  # file descriptor
        self._wandb: wandb.Run | None = None
        self._progress: Progress | None = None
        self._total_steps = total_steps

    @classmethod
    def open(
        cls,
        run: Path,
        config: dict[str, Any],
        *,
        main: bool,
        total_steps: int | None = None,
        wandb_mode: str | None = None,
        console: Console | None = None,
    ) -> Self:
        """Write RUN/config.json, and open RUN/metrics.jsonl for appending, the console and wandb.

        `run`: the run's folder; made if it is not there.
        `config`: the resolved config and what it was run on; anything JSON can hold.
        `main`: whether this process writes; False makes every method a no-op.
        `total_steps`: the step at which training ends, for the progress bar; None where it isn't known.
        `wandb_mode`: "online", "offline" or "disabled"; None: what WANDB_MODE says, else online if the user
        is logged in, else offline.
        `console`: where to print; None: stdout.

        Raises OSError where the folder can't be written; nothing that goes wrong in wandb raises.
        """
        tracker = cls(run, main=main, total_steps=total_steps, console=console or Console())
        if main:
            run.mkdir(parents=True, exist_ok=True)
            write_file(run / CONFIG_NAME, json.dumps(config, indent=1).encode() + b"\n")
            tracker._open_metrics()
            tracker._open_wandb(config, wandb_mode)
            tracker._open_progress()
        return tracker

    def truncate_after(self, step: int) -> None:
        """Drop the events of later steps than `step`, the step a resumed run continues from.

        Also drops a last line that a killed process left unfinished, so call it at every start, with 0 for
        a fresh one. The new file replaces the old by a rename: a kill leaves one or the other. Raises
        `TrainingError` for a line that is not an event.
        """
        if self._metrics is None:
            return
        path = self._run / METRICS_NAME
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _step_of(line, path) <= step]
        if len(kept) < len(lines):
            write_file(path, b"".join(kept))
            os.close(self._metrics)  # it still writes to the file that was replaced
            self._open_metrics()
        if self._progress is not None:
            self._progress.reset(self._progress.task_ids[0], total=self._total_steps, completed=step)

    def log_train(
        self,
        *,
        step: int,
        epoch: int,
        samples: int,
        loss: float,
        pooled_dice: float,
        lr: float,
        grad_norm: float,
        images_per_s: float,
        data_wait: float,
        skipped: int = 0,
    ) -> None:
        """Write down one logged training step.

        `step`: optimizer updates made so far.
        `epoch`: the epoch of this step, from 0.
        `samples`: samples trained on so far, in all epochs and on all ranks.
        `loss`, `pooled_dice`, `grad_norm`: of the global batch; a value that isn't finite is written as null.
        `lr`: learning rate of this step.
        `images_per_s`: on all ranks together, since the last logged step.
        `data_wait`: share of the time since the last logged step spent waiting for a batch, 0–1.
        `skipped`: steps since the last logged one whose update was left out, as loss or gradient was not finite.
        """
        if not self._main:
            return
        metrics = {
            "step": step,
            "epoch": epoch,
            "samples": samples,
            "loss": loss,
            "pooled_dice": pooled_dice,
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_s": images_per_s,
            "data_wait": data_wait,
            "skipped": skipped,
        }
        self._append({"event": "train", **metrics})
        self._log_wandb("train", metrics)
        if self._progress is not None:
            measured = f"loss {loss:.4f}  dice {pooled_dice:.3f}  {images_per_s:.0f} img/s  wait {data_wait:.0%}"
            self._progress.update(self._progress.task_ids[0], completed=step, epoch=epoch, measured=measured)
        else:
            total = "" if self._total_steps is None else f"/{self._total_steps}"
            self.note(
                f"step {step}{total}  epoch {epoch}  loss {loss:.4f}  pooled dice {pooled_dice:.4f}"
                f"  lr {lr:.2e}  grad norm {grad_norm:.3g}  {images_per_s:.1f} images/s  wait {data_wait:.0%}"
            )
        if skipped:
            self.note(f"step {step}: the updates of {skipped} steps were left out: loss or gradient not finite")

    def log_evaluation(
        self,
        *,
        step: int,
        split: str,
        n: int,
        mean_dice: float,
        pooled_dice: float,
        mean_jaccard: float,
        thresholded_jaccard: float,
    ) -> None:
        """Write down one evaluation of a whole split.

        `step`: optimizer updates made before it.
        `n`: images counted. The scores are 0–1, as `isicdist.metrics.dice.DiceSummary` defines them.
        """
        if not self._main:
            return
        metrics = {
            "step": step,
            "split": split,
            "n": n,
            "mean_dice": mean_dice,
            "pooled_dice": pooled_dice,
            "mean_jaccard": mean_jaccard,
            "thresholded_jaccard": thresholded_jaccard,
        }
        self._append({"event": "evaluate", **metrics})
        self._log_wandb(split, {name: value for name, value in metrics.items() if name != "split"})
        self.note(
            f"step {step}  {split} ({n} images)  mean dice {mean_dice:.4f}  pooled dice {pooled_dice:.4f}"
            f"  mean jaccard {mean_jaccard:.4f}  thresholded jaccard {thresholded_jaccard:.4f}"
        )

    def note(self, text: str) -> None:
        """Print one line on the console, above the progress bar where there is one."""
        if self._main:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, state: State = "finished") -> None:
        """End the record: `state` is how the run ended, and wandb is told. A second call does nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=1 if state == "failed" else 0)
            except Exception as error:  # a dashboard never fails a run
                self._give_up_wandb(error)
            self._wandb = None
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if error is None else "failed")

    def _open_metrics(self) -> None:
        self._metrics = os.open(self._run / METRICS_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _append(self, event: dict[str, Any]) -> None:
        """Write one event as one line with one system call, so that a reader never sees half of it."""
        if self._metrics is None:
            raise ValueError("the tracker is closed")
        line = json.dumps({name: _finite_or_none(value) for name, value in event.items()}, allow_nan=False)
        data = f"{line}\n".encode()
        if os.write(self._metrics, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._run / METRICS_NAME))

    def _open_progress(self) -> None:
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[measured]}"),
            console=self._console,
            refresh_per_second=2,  # the bar's thread shares the GIL with the training loop
        )
        self._progress.add_task("train", total=self._total_steps, epoch=0, measured="")
        self._progress.start()

    def _open_wandb(self, config: dict[str, Any], mode: str | None) -> None:
        try:
            mode, why = resolve_wandb_mode(mode)
            if mode == "disabled":
                return
            import wandb

            try:
                self._wandb = self._start_wandb(config, mode)
            except wandb.Error as error:  # logged in, but on a node without a way out: keep what can be kept
                if mode != "online":
                    raise
                wandb.teardown()  # its service holds on to the run that did not start
                mode, why = "offline", f"online failed: {_one_line(error)}"
                self._wandb = self._start_wandb(config, mode)
        except Exception as error:  # a dashboard never fails a run
            self._give_up_wandb(error)
            return
        if mode == "online":
            self.note(f"wandb: {self._wandb.url}")
        else:
            self.note(f"wandb: {mode} ({why}); in {self._run / 'wandb'}")

    def _start_wandb(self, config: dict[str, Any], mode: str) -> wandb.Run:
        import wandb

        run = wandb.init(
            project="isicdist",
            id=self._wandb_id(),
            name=self._run.resolve().name,
            dir=self._run,
            config=config,
            mode=mode,  # pyright: ignore[reportArgumentType]
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_WANDB_INIT_TIMEOUT,
                finish_timeout=_WANDB_FINISH_TIMEOUT,
            ),
        )
        # Steps as our own axis: wandb's would refuse the steps that a resumed run makes again.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _wandb_id(self) -> str:
        """The run's id at wandb: drawn at the first start, then read, so a resumed run is the same run."""
        path = self._run / WANDB_ID_NAME
        if not path.exists():
            write_file(path, f"{secrets.token_hex(4)}\n".encode())
        return path.read_text().strip()

    def _log_wandb(self, prefix: str, metrics: dict[str, Any]) -> None:
        if self._wandb is None:
            return
        named = {name if name == "step" else f"{prefix}/{name}": value for name, value in metrics.items()}
        try:
            self._wandb.log(named)
        except Exception as error:  # a dashboard never fails a run
            self._give_up_wandb(error)

    def _give_up_wandb(self, error: Exception) -> None:
        self._wandb = None
        self.note(f"wandb: off for the rest of this run: {_one_line(error)}")


def resolve_wandb_mode(mode: str | None = None) -> tuple[str, str]:
    """What wandb will do and why, without a question on the terminal or a request to the network.

    `mode`: what the caller wants, before what WANDB_MODE says. Returns (mode, reason); "online" comes only
    with credentials, which wandb looks for in WANDB_API_KEY, its settings and the netrc file.
    """
    mode = mode or os.environ.get("WANDB_MODE") or None
    if mode not in (None, "online"):
        return mode, "as asked"
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if wandb.login(prompt=False, verify=False):
        return "online", "logged in"
    return "offline", "not logged in: `wandb login` changes that"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _step_of(line: bytes, path: Path) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        raise TrainingError(f"{path}: not an event: {line[:60]!r}; repair that line or move the file away") from None


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
