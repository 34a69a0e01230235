"""Reproduce a run: the commands that train and evaluate it again, from its config.json."""

from __future__ import annotations

import shlex
from typing import Any

from isicdist.config import TrainConfig
from isicdist.report.collect import RunFiles
from isicdist.report.compare import flat_settings

DATA, RUN = "DIR", "NEW_RUN"
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
    """List the commands that score each evaluated split again."""
    summaries = [evaluation.summary for evaluation in run.evaluations.values()]
    words = ["isicdist", "evaluate", "--data", DATA, "--checkpoint", RUN]
    return [
        shlex.join([*words, "--split", summary.split, *(["--tta", summary.tta] if summary.tta != "off" else [])])
        for summary in summaries
    ]


def _words(value: Any) -> list[str]:
    if isinstance(value, bool):
        return [str(value).lower()]
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]  # pyright: ignore[reportUnknownArgumentType]
