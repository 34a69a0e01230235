"""Describe one build to all of its worker processes; the description can be pickled to other machines."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from shards.errors import SourceError, ToolkitError
from shards.inputs.source import Source, open_source
from shards.planning.plan import BuildOptions
from shards.writing.records import read_record
from shards.writing.target import WORK, Target

PLAN = f"{WORK}/plan.json"
"""Name of the plan file: the identity of the build that was started in the target."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One build: its sources, target and options."""

    target: Target
    sources: list[Source]
    options: BuildOptions
    identity: dict[str, Any]
    """Options and digest of the inputs: the content of the plan file in the target."""

    def check_access(self) -> None:
        """Raise ToolkitError when this machine does not see the sources or the set that is built."""
        host = socket.gethostname()
        try:
            for source in self.sources:
                open_source(source.location)
            is_same_build = read_record(self.target, PLAN) == self.identity
        except (SourceError, OSError) as error:
            raise ToolkitError(f"a worker on {host} does not see what this machine does ({error})") from error
        if not is_same_build:
            raise ToolkitError(f"a worker on {host} sees another build in {self.target.location}; share that folder")

    def close(self) -> None:
        """Close the files that this process has opened."""
        for source in self.sources:
            source.close()
