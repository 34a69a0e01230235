"""The `isic-shards` command: what each subcommand takes, and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from shards.command_line import exit_code_of
from shards.errors import CorruptShardError, UsageError
from shards.geometry import ResizeMode
from shards.planning.plan import BuildOptions, OnBadInput, OriginalMasks

app = App(
    name="isic-shards",
    help="Pack images and masks into WebDataset tar shards, and look after them.",
    version_flags=[],
    suppress_keyboard_interrupt=False,  # Ctrl-C says its line, too
)


@app.command
def build(
    *,
    images: str,
    masks: str,
    out: str,
    size: int | Literal["original"] = 512,
    fit: ResizeMode = "stretch",
    split: str = "train=0.8,val=0.1,test=0.1",
    split_file: str | None = None,
    groups: str | None = None,
    seed: int = 0,
    samples_per_shard: int = 256,
    workers: int | None = None,
    scheduler: str | None = None,
    on_bad_input: OnBadInput = "fail",
    mask_suffix: str = BuildOptions.mask_suffix,
    original_masks: OriginalMasks = "eval",
) -> int:
    """Pack the pairs of a source into a shard set.

    Run again, it completes a build that was killed. The same input and options give the same bytes.

    Parameters
    ----------
    images
        Folder, .zip or fsspec URL with the images.
    masks
        Folder, .zip or fsspec URL with the masks; it may be the same.
    out
        Folder or fsspec URL for the shard set.
    size
        Side of the square images in pixels, or original to copy images and masks as they are, undecoded.
    fit
        How an image is brought to the square: squeezed, on black, or its centre.
    split
        The fraction of the groups in each split.
    split_file
        FILE.csv with the columns id and split, in place of --split.
    groups
        FILE.csv:COLUMN, as metadata.csv:lesion_id; the images of one value stay in one split.
    seed
        Decides which group is in which split, and the order in the shards.
    samples_per_shard
        At most that many samples in one shard.
    workers
        Processes that pack; every core by default.
    scheduler
        Address of a running Dask cluster that packs instead, as tcp://host:8786; its machines see the same paths.
    on_bad_input
        fail: check all inputs, list the bad ones and build nothing; skip: leave them out and list them.
    mask_suffix
        What a mask's name has after its image's.
    original_masks
        Which splits keep the masks at original resolution: none, eval (all but train), or all.
    """
    from shards import console
    from shards.build import build as run
    from shards.inputs.match import BadInputError

    options = BuildOptions(
        size=None if size == "original" else size,
        fit=fit,
        split=split,
        split_file=split_file,
        groups=groups,
        seed=seed,
        samples_per_shard=samples_per_shard,
        on_bad_input=on_bad_input,
        mask_suffix=mask_suffix,
        original_masks=original_masks,
    )
    try:
        with console.progress("packing", "pairs") as report:
            result = run(images, masks, out, options, workers=workers, scheduler=scheduler, report=report)
    except BadInputError as error:
        console.print_rejected(error.rejected)
        raise
    console.print_build(result)
    return 0


@app.command
def verify(directory: str, /, *, deep: bool = False) -> int:
    """Check every byte of a shard set against its index.

    Parameters
    ----------
    directory
        The shard set: a folder or an fsspec URL.
    deep
        Decode every sample too.
    """
    from shards import console
    from shards.verify import verify as run

    with console.progress("verifying", "shards") as report:
        found = run(directory, deep=deep, report=report)
    for fault in found.faults:
        print(fault, file=sys.stderr)
    if found.faults:
        raise CorruptShardError(
            f"{directory}: {len(found.faults)} faults (first: {found.faults[0]}); copy the set again or rebuild it"
        )
    print(f"{directory}: {found.shards} shards, {found.samples} samples, {found.bytes} bytes, all as the index says")
    return 0


@app.command
def info(directory: str, /) -> int:
    """Show what is in a shard set.

    Parameters
    ----------
    directory
        The shard set: a folder or an fsspec URL.
    """
    from shards import console
    from shards.reader import ShardSet

    console.print_info(ShardSet.open(directory))
    return 0


@app.command
def preview(directory: str, /, *, out: Path, samples: int = 24) -> int:
    """Draw a contact sheet: images of every split with the outlines of their masks.

    Parameters
    ----------
    directory
        The shard set: a folder or an fsspec URL.
    out
        The PNG file to write.
    samples
        How many images, shared between the splits.
    """
    from shards.preview import contact_sheet, save

    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: give a name that ends in .png")
    save(contact_sheet(directory, samples), out)
    print(f"{out}")
    return 0


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Run one command.

    Parameters
    ----------
    debug
        Show the traceback of a failure.
    """

    def command() -> int | None:
        try:
            return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        except CycloptsError as error:
            raise UsageError(f"{' '.join(str(error).split())} See isic-shards --help.") from error

    return exit_code_of(command, debug=debug)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(app.meta(sys.argv[1:] if arguments is None else arguments, result_action="return_value"))
