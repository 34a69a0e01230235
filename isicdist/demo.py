"""Demo: generate images, build shards, train on two processes, evaluate, predict, report, by the user's commands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from isicdist.data.synthetic import INPUT_FOLDER, TRUTH_FOLDER
from shards.errors import ToolkitError, UsageError

MARKER = ".isicdist-demo"
PROCESSES = 2
REPORT_NAME = "report.html"


def demo(out: Path, samples: int) -> None:
    """Run synth, build, train, evaluate, predict and report on `samples` generated pairs; everything lies in `out`.

    An earlier demo in `out` is replaced. Raises UsageError when `out` holds something else, ToolkitError when one of
    the commands fails.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UsageError(f"{out}: not empty and not of an earlier demo; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (out / MARKER).touch()
    console = Console()
    for title, command in demo_commands(out, samples).items():
        console.rule(title)
        shown = ["python" if word == sys.executable else word for word in command]
        console.print(" ".join(shown), style="dim", highlight=False, soft_wrap=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            raise ToolkitError(f"the demo stopped at {title!r}: exit code {code} (its message stands above)")
    console.rule("Done")
    console.print(f"curves and pictures: open {out / REPORT_NAME} in a browser", highlight=False, soft_wrap=True)


def demo_commands(out: Path, samples: int) -> dict[str, list[str]]:
    """Give the commands by title, in order; each starts the installed packages with this interpreter."""
    archive, data, run = out / "archive", str(out / "shards"), str(out / "run")
    images, masks = str(archive / INPUT_FOLDER), str(archive / TRUTH_FOLDER)
    isicdist, isic_shards = [sys.executable, "-m", "isicdist"], [sys.executable, "-m", "shards"]
    build = ["--images", images, "--masks", masks, "--out", data, "--size", "128", "--samples-per-shard", "32"]
    train = ["-m", "isicdist", "train", "--data", data, "--run", run, "--recipe", "demo"]
    evaluate = ["--data", data, "--checkpoint", run, "--split", "test"]
    predict = ["--checkpoint", run, "--images", images, "--out", str(out / "masks")]
    return {
        "Generated images": [*isicdist, "synth", "--out", str(archive), "--samples", str(samples)],
        "Shards": [*isic_shards, "build", *build],
        "Training": [*_accelerate_launch(), *train],
        "Scores on the test split": [*isicdist, "evaluate", *evaluate],
        "Masks": [*isicdist, "predict", *predict],
        "The run": [*isicdist, "report", run, "--out", str(out / REPORT_NAME)],
    }


def _accelerate_launch() -> list[str]:
    """Launch two processes, on GPUs where there are two, else on the CPU; one process on a single GPU."""
    import torch

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    if torch.cuda.device_count() == 1:
        launch += ["--num_processes", "1"]
    else:
        launch += ["--multi_gpu", "--num_processes", str(PROCESSES), "--main_process_port", "0"]
    return [*launch, "--mixed_precision", "bf16", "--dynamo_backend", "no"]
