"""The folder of a run: the names of its files, which commands find by them.

RUN/config.json                     the resolved config, nested by section, and what the run was started on
RUN/metrics.jsonl                   the log, one event per line (`isicdist.training.tracking.events`)
RUN/checkpoints/step-00000065/      weights and state of one step (`isicdist.training.checkpoint`)
RUN/best/                           the best model, self-contained (`isicdist.network.best`)
RUN/evaluation/<split>/             the scores of the best model (`isicdist.metrics.results`)
RUN/REQUEUE                         a signal has stopped the run, and it waits to be started again
RUN/.lock                           a process trains in the folder (`isicdist.training.state.RunLock`)

The folder of a cross-validation holds the runs of its folds, RUNS/fold-1 and so on, and `isicdist.metrics.pooled`.
Dashboards have files of their own: RUN/wandb, RUN/wandb-id, RUN/tensorboard.
"""

from __future__ import annotations

CONFIG_NAME, METRICS_NAME, REQUEUE_NAME, LOCK_NAME = "config.json", "metrics.jsonl", "REQUEUE", ".lock"
CHECKPOINTS_FOLDER, BEST_FOLDER, EVALUATION_FOLDER = "checkpoints", "best", "evaluation"
