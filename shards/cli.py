"""The `isic-shards` command line. Heavy imports wait inside the commands: `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from shards.command_line import create_app, run_app
from shards.errors import CorruptShardError, UsageError
from shards.planning.plan import BuildOptions

app = create_app(
    name="isic-shards", help="Pack images and masks into WebDataset tar shards, and look after them.", version_flags=[]
)


@app.command
def build(
    *,
    images: Annotated[list[str], Parameter(negative=())],
    masks: Annotated[list[str], Parameter(negative=())],
    out: str,
    options: Annotated[BuildOptions | None, Parameter(name="*", negative_bool=())] = None,
    workers: int | None = None,
    scheduler: str | None = None,
    allow_empty_masks: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Pack the pairs of a source into a shard set.

    Run again, it completes a build that was killed. The same input and options give the same bytes.

    Parameters
    ----------
    images
        Folder, .zip or fsspec URL with the images; several, if given more than once.
    masks
        Folder, .zip or fsspec URL with the masks, in the same way; it may be the same.
    out
        Folder or fsspec URL for the shard set.
    workers
        Number of processes; one for each core by default.
    scheduler
        Address of a Dask cluster to run on instead, as tcp://host:8786; its machines see the same paths.
    allow_empty_masks
        Build a set in which no mask has a lesion.
    """
    from shards import console
    from shards.build import build as build_set
    from shards.inputs.match import BadInputError
    from shards.progress import progress
    from shards.reader import ShardSet

    try:
        with progress("packing", "pairs") as report:
            result = build_set(
                images,
                masks,
                out,
                options,
                workers=workers,
                scheduler=scheduler,
                allow_empty_masks=allow_empty_masks,
                report=report,
            )
    except BadInputError as error:
        console.print_rejected(error.rejected)
        raise
    console.print_build(result)
    if not result.already_complete and "://" not in result.location:  # it would be downloaded; `info` looks at it
        console.print_mask_warnings(ShardSet.open(result.location))
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
    from shards.progress import progress
    from shards.verify import verify as verify_set

    with progress("verifying", "shards") as report:
        verified = verify_set(directory, deep=deep, report=report)
    for fault in verified.faults:
        print(fault, file=sys.stderr)
    if verified.faults:
        number, first = len(verified.faults), verified.faults[0]
        raise CorruptShardError(f"{directory}: {number} faults (first: {first}); copy the set again or rebuild it")
    content = f"{verified.shards} shards, {verified.samples} samples, {verified.bytes} bytes"
    print(f"{directory}: {content}, all as the index says")
    return 0


@app.command
def info(directory: str, /) -> int:
    """Show the content of a shard set.

    Parameters
    ----------
    directory
        The shard set: a folder or an fsspec URL.
    """
    from shards import console
    from shards.reader import ShardSet

    shard_set = ShardSet.open(directory)
    console.print_info(shard_set)
    console.print_mask_warnings(shard_set)
    return 0


@app.command
def preview(directory: str, /, *, out: Path, samples: int = 24) -> int:
    """Draw a contact sheet: images of every split with the outlines of their masks, as a picture or as a page.

    Parameters
    ----------
    directory
        The shard set: a folder or an fsspec URL.
    out
        The file to write: .png, or .html, a page to filter by split and flag whose masks toggle.
    samples
        Number of images, shared between the splits.
    """
    from shards.preview import contact_sheet, save

    kind = out.suffix.lower()
    if kind not in (".png", ".html"):
        raise UsageError(f"--out {out}: give a name that ends in .png or .html")
    if kind == ".html":
        from shards.files import write_file
        from shards.preview_page import preview_page

        page = preview_page(directory, samples)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, page.encode())
    else:
        save(contact_sheet(directory, samples), out)
    print(f"{out}")
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with its exit code (`shards.command_line.run_app`)."""
    run_app(app, sys.argv[1:] if arguments is None else arguments)
