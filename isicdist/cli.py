"""The `isicdist` command. Heavy imports wait inside the commands: `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict

from isicdist import __version__
from isicdist.config import Fold, TrainConfig, Tta
from isicdist.settings_file import load_file, load_recipe
from shards.command_line import create_app, run_app
from shards.errors import UsageError

DEFAULT_RECIPE = "isic2018-128"


def _settings(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in the settings of `--config` or `--recipe` for every flag that the command line does not give."""
    if commands != ("train",):
        return
    given = {argument.name: argument.tokens[-1].value for argument in arguments if argument.tokens}
    if "--config" in given and "--recipe" in given:
        raise UsageError("--config and --recipe: give one of the two; a config file holds all that a recipe does")
    if "--config" in given:
        settings = load_file(Path(given["--config"]))
    else:
        settings = load_recipe(given.get("--recipe", DEFAULT_RECIPE))
    Dict(settings, use_commands_as_keys=False, source="config")(app, commands, arguments)


app = create_app(
    name="isicdist",
    help="Train, score and use a skin-lesion segmentation network. Make the data with `isic-shards build`.",
    version=__version__,
    config=[_settings],
)


@app.command
def train(
    *,
    data: str,
    run: Path,
    config: Path | None = None,
    recipe: str = DEFAULT_RECIPE,
    settings: Annotated[TrainConfig | None, Parameter(name="*", consume_multiple=True, negative_iterable=())] = None,
) -> None:
    """Train the Improved UNet. Start it with: accelerate launch --config_file launch/X.yaml -m isicdist train ...

    Parameters
    ----------
    data
        The shard set that `isic-shards build` made: a folder or an fsspec URL.
    run
        The folder of the run; an existing run resumes from its newest checkpoint.
    config
        A TOML file of settings; flags win over it.
    recipe
        A named recipe, instead of --config.
    settings
        The settings, by section.
    """
    from isicdist.train import train as command

    command(settings or TrainConfig(), data, run)


@app.command
def crossval(
    *flags: str,
    data: str,
    run: Path,
    folds: int = 5,
    launch: Path | None = None,
    only_print: Annotated[bool, Parameter(name="--print", negative=())] = False,
) -> int:
    """Train and score every fold of train and val; pool the scores of all images, each held out once.

    A second call goes on where the first one ended. Example: isicdist crossval --data DIR --run RUNS -- --epochs 60

    Parameters
    ----------
    flags
        Flags of `isicdist train`, after --.
    data
        The shard set: a folder or an fsspec URL.
    run
        The folder of the runs, RUNS/fold-1 and so on, and of their pooled scores.
    folds
        Number of folds.
    launch
        A file of `accelerate launch` to start each fold with, as launch/gpu8.yaml; else each is one process.
    only_print
        Print the commands of each fold in a line instead, for a scheduler.
    """
    from isicdist.crossval import crossval as command
    from isicdist.crossval import print_commands

    if only_print:
        print_commands(data, run, folds, flags, launch)
        return 0
    return command(data, run, folds, flags, launch)


@app.command
def evaluate(
    *,
    data: str,
    checkpoint: Path | None = None,
    ensemble: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative=())] = None,
    split: str | None = None,
    fold: str | None = None,
    metadata: str | None = None,
    tta: Tta = "off",
    exclude: Path | None = None,
    out: Path | None = None,
) -> None:
    """Score the best model of a run on a split, exactly, on as many processes as `accelerate launch` starts.

    An ensemble is compared with each of its models by the paired bootstrap.

    Parameters
    ----------
    data
        The shard set: a folder or an fsspec URL.
    checkpoint
        The run, or its `best` folder.
    ensemble
        Several of them, or the folder of a cross-validation, instead of --checkpoint: their probabilities are averaged.
    split
        The split to score; by default test.
    fold
        K/N: score the images that a run trained with --fold K/N held out, instead of a split.
    metadata
        FILE.csv:COLUMN, as metadata.csv:sex; the images of each value are scored as a subgroup, too.
    tta
        Average over the mirrored copies of each image (flips) or over all 8 symmetries of the square (d4).
    exclude
        FILE.csv with the column id, as of isicdist audit: add the scores without the images of the verdict wrong.
    out
        The folder for the scores, instead of RUN/evaluation/SPLIT.
    """
    models = _models(checkpoint, ensemble)
    from rich.console import Console

    from isicdist.evaluate import evaluate as command
    from isicdist.metrics.tables import show_evaluation

    if split and fold:
        raise UsageError("--split and --fold: give one of the two; a fold is a part of train and val")
    scored = Fold.parse(fold) if fold else split or "test"
    result = command(models, data, scored, metadata=metadata, tta=tta, exclude=exclude, out=out)
    if result is None:  # a process that is not the main one
        return
    results, out = result
    show_evaluation(results.summary, Console())
    print(f"written to {out}")


@app.command
def audit(*, data: str, run: Path, out: Path) -> None:
    """Rank the pairs of a set by how suspicious their masks are, and make a page to go through them.

    Every image is predicted by models of a cross-validation that have not seen it. The verdicts, saved from the page,
    go into isic-shards build --exclude and isicdist evaluate --exclude.

    Parameters
    ----------
    data
        The shard set: a folder or an fsspec URL.
    run
        The folder of a cross-validation of this set, RUNS of isicdist crossval.
    out
        The folder for audit.csv, audit.html and summary.json.
    """
    from isicdist.audit import PAGE_NAME, TABLE_NAME
    from isicdist.audit import audit as command

    counts = command(data, run, out)
    for reason, number in counts.reasons.items():
        print(f"{number:8d}  {reason}")
    print(f"{counts.images} pairs ranked in {out / TABLE_NAME}; go through them with {out / PAGE_NAME}")


@app.command
def predict(
    *,
    images: str,
    out: Path,
    checkpoint: Path | None = None,
    ensemble: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative=())] = None,
    tta: Tta = "off",
    probabilities: Annotated[bool, Parameter(negative=())] = False,
    overlay: Annotated[bool, Parameter(negative=())] = False,
    submission: Path | None = None,
) -> None:
    """Write a mask for every image, 0 and 255, at the image's own resolution; each process takes its share.

    Masks that exist are not predicted again, so that an interrupted prediction resumes.

    Parameters
    ----------
    images
        A folder, a .zip archive, a URL or a single picture.
    out
        The folder for the masks.
    checkpoint
        The run, or its `best` folder.
    ensemble
        Several of them, or the folder of a cross-validation, instead of --checkpoint: their probabilities are averaged,
        and their thresholds.
    tta
        Average over the mirrored copies of each image (flips) or over all 8 symmetries of the square (d4).
    probabilities
        Write OUT/probabilities/KEY.png, too: 8 bits, value v for a probability above v/256 up to (v+1)/256.
    overlay
        Write OUT/overlays/KEY.jpg, too: the image with the contour of its mask.
    submission
        Pack the masks into this .zip file, as ISIC 2018 Task 1 wants them.
    """
    models = _models(checkpoint, ensemble)
    from isicdist.predict import describe_ignored
    from isicdist.predict import predict as command

    done = command(models, images, out, tta=tta, probabilities=probabilities, overlay=overlay, submission=submission)
    if done is None:  # a process that is not the main one
        return
    print(f"{done.masks} masks written to {out}" + (f", {done.reused} were there" if done.reused else ""))
    if done.rejected:
        print(f"{done.rejected} images could not be used: see {out / 'rejected.csv'}", file=sys.stderr)
    if done.ignored:
        print(describe_ignored(done.ignored), file=sys.stderr)
    if submission:
        print(f"submission: {submission}")


@app.command
def export(
    run: Path | None = None,
    *,
    ensemble: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative=())] = None,
    out: Path,
    format: Literal["onnx"] = "onnx",
) -> None:
    """Write the best model of a run for programs without torch, and compare the two on generated images.

    Its input is uint8 RGB images (batch, 3, size, size), fitted as in training; its output lesion probabilities.

    Parameters
    ----------
    run
        The run, or its `best` folder.
    ensemble
        Several of them, or the folder of a cross-validation, instead: the model gives the mean of their probabilities.
    out
        The file to write, as model.onnx.
    format
        The kind of file.
    """
    models = _models(run, ensemble, "RUN")
    from isicdist.export import export_onnx

    same = export_onnx(models, out)
    print(f"written to {out}")
    print(
        f"onnxruntime against torch on {same.images} images: probabilities within {same.max_difference:.1e}, "
        f"{same.differing_pixels} of {same.pixels} mask pixels differ"
    )


@app.command
def report(*runs: Path, out: Path | None = None) -> None:
    """Show settings and scores of one run or several; --out writes a page with curves, pictures and comparisons.

    Parameters
    ----------
    runs
        The folders of the runs; several are compared with the first.
    out
        The HTML file to write, as report.html: one file that loads nothing from the network.
    """
    from rich.console import Console

    from isicdist.report import report as command

    command(runs, Console(), out)


@app.command
def doctor(*, data: str | None = None, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False) -> int:
    """Check this machine, or under `accelerate launch` every rank: versions, devices, network, caches, speed.

    Parameters
    ----------
    data
        A shard set to measure on: decoding, the step, what bounds a run, and the time of an epoch.
    as_json
        Print one JSON object instead of a table.
    """
    from isicdist.doctor import run_doctor

    return run_doctor(data, as_json=as_json)


@app.command
def launch_file(name: str, /, *, out: Path | None = None) -> None:
    """Print a launch file: of accelerate (cpu2, gpu1, gpu8, multinode), SLURM (slurm, slurm-shards) or another cluster.

    Parameters
    ----------
    name
        The launch file.
    out
        Write it to this file instead, as launch/gpu8.yaml.
    """
    from isicdist.launch_file import read_launch_file, write_launch_file

    if out is None:
        print(read_launch_file(name), end="")
    else:
        write_launch_file(name, out)
        print(f"{out}")


@app.command
def synth(*, out: Path, samples: int = 64, seed: int = 0) -> None:
    """Make images and masks that look like dermoscopy, named and laid out like the ISIC 2018 archives.

    Parameters
    ----------
    out
        The folder to make.
    samples
        Pairs of image and mask.
    seed
        Random seed.
    """
    from isicdist.data.synthetic import synthesize
    from shards.progress import progress

    with progress("synth", "pairs") as report:
        images, masks = synthesize(out, samples, seed=seed, report=report)
    print(f"isic-shards build --images {images} --masks {masks} --out DIR")


@app.command
def demo(*, out: Path = Path("demo"), samples: int = 240) -> None:
    """The whole way on generated images: synth, build, train on two processes, evaluate, predict, report.

    Parameters
    ----------
    out
        The folder of the demo; an earlier demo there is replaced.
    samples
        Pairs of image and mask.
    """
    from isicdist.demo import demo as command

    command(out, samples)


def _models(run: Path | None, ensemble: list[Path] | None, flag: str = "--checkpoint RUN") -> list[Path]:
    """Give the runs of the models to use. Raises UsageError unless one of the two is given."""
    models = [run] if run else ensemble
    if not models or (run and ensemble):
        raise UsageError(f"give {flag}, or --ensemble RUN1 RUN2 ... in its place")
    return models


SWITCH_VALUES = ("true", "false", "yes", "no", "1", "0")  # of a boolean, for cyclopts; a number may be joined as well


def _join_switches(words: list[str]) -> list[str]:
    """Turn `--augment.enabled false` into `--augment.enabled=false`.

    cyclopts takes the value of a boolean flag only after `=`, also with `Parameter(n_tokens=1)`; the next word would be
    an unexpected argument. Only nested flags (with a dot in their name) have this form.
    """
    joined: list[str] = []
    for word in words:
        if word.lower() in SWITCH_VALUES and joined and joined[-1].startswith("--") and "." in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a failure, 2 bad usage, 85 stopped by a signal and saved."""
    run_app(app, _join_switches(list(sys.argv[1:] if arguments is None else arguments)))
