"""The whole way on generated images, by the same commands that a user types."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from shards.errors import ToolkitError, UsageError

MARKER = ".isicdist-demo"
PROCESSES = 2


def demo(out: Path, samples: int) -> None:
    """Run synth, build, train, evaluate, predict and report under `out`.

    Raises UsageError when `out` holds something that is no demo, ToolkitError when one of the commands fails.
    """
    console = Console()
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UsageError(f"{out}: not empty and not of an earlier demo; give another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    archive, data, run = out / "archive", out / "shards", out / "run"
    images = archive / "ISIC2018_Task1-2_Training_Input"
    masks = archive / "ISIC2018_Task1_Training_GroundTruth"
    isicdist, shards = [sys.executable, "-m", "isicdist"], [sys.executable, "-m", "shards"]
    training = ["-m", "isicdist", "train", "--data", str(data), "--run", str(run), "--recipe", "demo"]
    build = ["--images", str(images), "--masks", str(masks), "--size", "128", "--samples-per-shard", "32"]
    scored = ["--data", str(data), "--checkpoint", str(run), "--split", "test"]
    steps = {
        "Generated images": [*isicdist, "synth", "--out", str(archive), "--samples", str(samples)],
        "Shards": [*shards, "build", *build, "--out", str(data)],
        "Training": [*_launch(), *training],
        "Scores on the test split": [*isicdist, "evaluate", *scored],
        "Masks": [*isicdist, "predict", "--checkpoint", str(run), "--images", str(images), "--out", str(out / "masks")],
        "The run": [*isicdist, "report", str(run)],
    }
    for title, command in steps.items():
        console.rule(title)
        console.print(" ".join(_shown(command)), style="dim", highlight=False, soft_wrap=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            raise ToolkitError(f"the demo stopped at {title!r}: exit code {code} (its message stands above)")
    picture = run / "evaluation" / "test" / "examples.png"
    console.rule("Done")
    console.print(f"worst, median and best images: {picture}", highlight=False, soft_wrap=True)


def _launch() -> list[str]:
    """`accelerate launch` of two processes: on GPUs where there are two, on one where there is one, else on the CPU."""
    import torch

    gpus = torch.cuda.device_count()
    words = ["--multi_gpu", "--num_processes", str(PROCESSES), "--num_machines", "1", "--main_process_port", "0"]
    if 0 < gpus < PROCESSES:
        words = ["--num_processes", "1", "--num_machines", "1"]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *words,
        "--mixed_precision",
        "bf16",
        "--dynamo_backend",
        "no",
    ]


def _shown(command: list[str]) -> list[str]:
    return ["python" if word == sys.executable else word for word in command]
