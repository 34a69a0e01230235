"""Reproduce a run: the commands that train and evaluate it again, from its config.json."""

from __future__ import annotations

import shlex
from typing import Any

from isicdist.config import Fold, TrainConfig, flat_settings
from isicdist.report.collect import RunFiles

DATA, SCORED_DATA, RUN = "DIR", "OTHER_DIR", "NEW_RUN"
"""Placeholders: neither folder is known on the machine of the reader."""


def train_flags(run: RunFiles) -> list[list[str]]:
    """List every setting of a run as the flag of `isicdist train`, a list of words each.

    All are given, so that the result does not depend on a recipe. Settings that this version does not know are left
    out.
    """
    settings = flat_settings(run.config)
    known = flat_settings(TrainConfig().to_json())
    return [[f"--{name.replace('_', '-')}", *_words(settings[name])] for name in known if name in settings]


def train_command(run: RunFiles) -> str:
    """Format the command that trains a run again, a line for each flag."""
    world_size = run.config["world_size"]
    launch = ["accelerate", "launch", "--num_machines", "1", "--num_processes", str(world_size)]
    launch += ["--multi_gpu"] * (world_size > 1)  # also on the CPU: without it accelerate starts one process
    launch += ["--mixed_precision", run.config["mixed_precision"], "--dynamo_backend", "no"]
    variables = "ACCELERATE_USE_CPU=true " * (run.config.get("device") == "cpu")
    command = ["-m", "isicdist", "train", "--data", DATA, "--run", RUN]
    return " \\\n  ".join([variables + shlex.join(launch), *map(shlex.join, [command, *train_flags(run)])])


def evaluate_commands(run: RunFiles) -> list[str]:
    """List the commands that score each evaluated split again; of another set than DIR, with its digest."""
    commands: list[str] = []
    for summary in (evaluation.summary for evaluation in run.evaluations.values()):
        same_set, fold = summary.data_digest == run.config["data_digest"], Fold.of_split(summary.split)
        words = ["isicdist", "evaluate", "--data", DATA if same_set else SCORED_DATA, "--checkpoint", RUN]
        words += ["--fold", str(fold)] if fold else ["--split", summary.split]
        words += ["--tta", summary.tta] if summary.tta != "off" else []
        commands.append(shlex.join(words) + ("" if same_set else f"  # {SCORED_DATA}: digest {summary.data_digest}"))
    return commands


def _words(value: Any) -> list[str]:
    if isinstance(value, bool):
        return [str(value).lower()]
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]  # pyright: ignore[reportUnknownArgumentType]
