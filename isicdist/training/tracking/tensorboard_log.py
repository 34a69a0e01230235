"""Log to TensorBoard: event files in RUN/tensorboard, for `tensorboard --logdir RUN`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from isicdist.metrics.thresholds import ThresholdCurve
from isicdist.training.tracking.client import CURVE_STRIDE, HISTOGRAM_BINS, Client, Position, Values
from isicdist.training.tracking.events import EvaluationDetails, Note, RunState

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoardLog(Client):
    """Writes the values of one run as TensorBoard's event files."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        """Write into `folder`; `config` is shown as a text."""
        self._folder, self._config = folder, config
        self._opened: SummaryWriter | None = None
        self._purge_step: int | None = None

    @classmethod
    def start(cls, run: Path, config: Mapping[str, Any], note: Note, *, joins: bool = False) -> Self | None:
        """Prepare to write into RUN/tensorboard; the first value makes the file.

        `joins`: only if the folder is there, and without the config.
        """
        folder = run / TENSORBOARD_FOLDER
        if joins:
            return cls(folder) if folder.is_dir() else None
        note(f"tensorboard: tensorboard --logdir {folder}")
        return cls(folder, config)

    def truncate_after(self, step: int) -> None:
        """Make TensorBoard hide the values of later steps, which earlier files of a resumed run hold."""
        self._purge_step = step + 1

    def log_scalars(self, position: Position, values: Values) -> None:
        """Write numbers by step."""
        for name, value in {**position, **values}.items():
            if name != "step":
                self._writer.add_scalar(name, value, position["step"])

    def log_evaluation(self, position: Position, split: str, scores: Values, details: EvaluationDetails) -> None:
        """Write scores, threshold curve, histogram of Dice, pictures with outlines, and a table of their scores."""
        self.log_scalars(position, scores)
        step = position["step"]
        self._writer.add_histogram(f"{split}/dice", details.dice, step, bins=HISTOGRAM_BINS)  # pyright: ignore[reportArgumentType]
        self._add_threshold_curve(f"{split}/thresholds", details.curve, step)
        for group, examples in details.grouped().items():
            pictures = np.stack([example.outlined() for example in examples])  # (N, H, W, 3)
            self._writer.add_images(f"{split}/{group}", pictures, step, dataformats="NHWC")
            rows = [f"|{each.key}|{each.dice:.4f}|{each.lesion_area:.4f}|" for each in examples]
            self._writer.add_text(
                f"{split}/{group}", "\n".join(["|key|Dice|lesion area|", "|---|---|---|", *rows]), step
            )
        self._writer.flush()

    def close(self, state: RunState) -> None:
        """Flush and close the file."""
        if self._opened:
            self._opened.close()

    @property
    def _writer(self) -> SummaryWriter:
        if self._opened is None:
            self._opened = SummaryWriter(str(self._folder), purge_step=self._purge_step)
            if self._config is not None:
                self._opened.add_text("config", f"```\n{json.dumps(self._config, indent=1)}\n```")
        return self._opened

    def _add_threshold_curve(self, tag: str, curve: ThresholdCurve, step: int) -> None:
        tp, fp, fn = (counts[::CURVE_STRIDE] for counts in curve.counts)
        columns: list[Any] = [tp, fp, curve.off.sum() - fp, fn]
        columns += [curve.precision[::CURVE_STRIDE], curve.recall[::CURVE_STRIDE]]
        self._writer.add_pr_curve_raw(tag, *columns, global_step=step, num_thresholds=len(tp))
