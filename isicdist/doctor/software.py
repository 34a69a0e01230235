"""Check the software: versions, the launcher, environment variables, JPEG, wandb."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from isicdist.doctor.check import INSTALL, Check
from shards.errors import UsageError


def check_versions() -> Iterator[Check]:
    """Compare Python and every dependency with the version ranges of this installation's metadata."""
    try:
        metadata = importlib.metadata.metadata("isicdist")
    except importlib.metadata.PackageNotFoundError:
        yield Check(name="isicdist", state="fail", found="not installed", advice=INSTALL)
        return
    wanted = SpecifierSet(metadata["Requires-Python"])
    version = ".".join(map(str, sys.version_info[:3]))
    fits = version in wanted
    yield Check(
        name="python",
        state="ok" if fits else "fail",
        found=version if fits else f"{version}, wanted {wanted}",
        advice="" if fits else f"make the environment with Python {wanted}",
    )
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        yield Check(
            name=requirement.name,
            state="ok" if fits else "fail",
            found=version if fits and version else f"{version or 'not installed'}, wanted {requirement.specifier}",
            advice="" if fits else INSTALL,
        )


def check_launcher() -> Iterator[Check]:
    """Look for accelerate of this environment on PATH, and for a WORLD_SIZE that another launch left in the shell."""
    command = shutil.which("accelerate")
    scripts = Path(sys.executable).parent
    if command is None:
        state, found = "warn", "not on PATH"
    elif Path(command).parent.resolve() != scripts.resolve():
        state, found = "warn", f"{command} is of another environment"
    else:
        state, found = "ok", command
    yield Check(
        name="accelerate launch",
        state=state,
        found=found,
        advice="" if state == "ok" else f"activate the environment: export PATH={scripts}:$PATH",
    )
    size = os.environ.get("WORLD_SIZE", "1")
    if size in ("", "1"):
        yield Check(name="WORLD_SIZE", state="ok", found="not set by a launcher: this process alone")
    elif is_launched(os.environ):
        yield Check(name="WORLD_SIZE", state="ok", found=f"{size}: every rank is checked")
    else:
        yield Check(
            name="WORLD_SIZE",
            state="fail",
            found=f"{size}, left over from another launch: a run would wait for processes that do not exist",
            advice="unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT",
        )


def is_launched(environ: Mapping[str, str]) -> bool:
    """Recognise a process that torchrun or `accelerate launch` has started as one of several."""
    return "TORCHELASTIC_RUN_ID" in environ and environ.get("WORLD_SIZE", "1") not in ("", "1")


def check_environment() -> Iterator[Check]:
    """List the environment variables that launchers, accelerate and torch would read, and refuse as a run would."""
    from isicdist.distributed.environment import notable, read_environment

    found = ", ".join(f"{name}={value}" for name, value in notable(os.environ).items()) or "none that matters is set"
    try:
        read_environment(dict(os.environ))
    except UsageError as error:
        yield Check(name="environment", state="fail", found=found, advice=str(error))
    else:
        yield Check(name="environment", state="ok", found=found)


def check_jpeg() -> Iterator[Check]:
    """Encode and decode a JPEG with simplejpeg."""
    import numpy as np
    import simplejpeg

    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    image = np.ascontiguousarray(np.broadcast_to(ramp[:, None, None], (64, 64, 3)))
    encoded = simplejpeg.encode_jpeg(image, quality=95)
    decoded = simplejpeg.decode_jpeg(encoded)
    fits = decoded.shape == image.shape and int(np.abs(decoded.astype(int) - image).max()) <= 8
    yield Check(
        name="JPEG",
        state="ok" if fits else "fail",
        found="simplejpeg decodes what it encodes" if fits else "simplejpeg decodes to other pixels",
        advice="" if fits else "pip install --force-reinstall simplejpeg",
    )


def check_wandb() -> Iterator[Check]:
    """Find the mode that wandb will run in."""
    from isicdist.training.tracking import resolve_wandb_mode

    mode, reason = resolve_wandb_mode()
    refused = os.environ.get("WANDB_MODE") == "online" and mode != "online"
    yield Check(
        name="wandb mode",
        state="warn" if refused else "ok",
        found=f"{mode} ({reason})",
        advice="wandb login, or unset WANDB_MODE" if refused else "",
    )
