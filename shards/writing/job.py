"""What every process that works on one build needs to know; it can be sent to other machines."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

from shards.errors import SourceError, ToolkitError
from shards.inputs.source import Source, open_source
from shards.planning.plan import BuildOptions
from shards.writing.target import WORK, Target, read

PLAN = f"{WORK}/plan.json"
"""Says which build has begun in a place."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One build: from where to where, and how."""

    target: Target
    sources: list[Source]
    options: BuildOptions
    identity: dict[str, Any]
    """What the plan file in the target holds."""

    def check_access(self) -> None:
        """Raise ToolkitError when this machine does not see the sources or the set that is built."""
        host = socket.gethostname()
        try:
            for source in self.sources:
                open_source(source.location)
            same = json.loads(read(self.target, PLAN)) == self.identity
        except (SourceError, OSError) as error:
            raise ToolkitError(f"a worker on {host} does not see what this machine does ({error})") from error
        if not same:
            raise ToolkitError(f"a worker on {host} sees another build in {self.target.location}; share that folder")

    def close(self) -> None:
        """Close what this process has opened."""
        for source in self.sources:
            source.close()
