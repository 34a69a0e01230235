"""What can go wrong, as a tree. Both packages raise these and nothing else for what a user can mend.

ToolkitError                 a failure said in one line                               exit 1
├── UsageError               a flag, a config value or a launch that cannot work      exit 2
├── SourceError              images or masks as they were given
├── ShardSetError            a shard set that is not there, incomplete or of another version
│   └── CorruptShardError    a byte that is not what the index says; names shard and key
├── CheckpointError          weights or a run that are missing, damaged or of another network
├── TrainingError            a run that cannot go on
└── StoppedError             a run that a signal stopped, with a checkpoint saved      exit 85

Every message is one line: what is wrong, where, and what to do about it. A command prints it on stderr
without a traceback (`--debug` shows that) and ends with the class's `exit_code`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import ClassVar


class ToolkitError(Exception):
    """A failure that a user can understand from one line."""

    exit_code: ClassVar[int] = 1


class UsageError(ToolkitError, ValueError):
    """A flag, a config value or a launch that cannot work as given."""

    exit_code = 2


class SourceError(ToolkitError):
    """Images or masks as they were given: missing, empty, unreadable, not in pairs."""


class ShardSetError(ToolkitError):
    """A shard set that is not there, not complete, or written by another version."""


class CorruptShardError(ShardSetError):
    """A byte of a shard that is not what the index says; the message names shard and key."""


class CheckpointError(ToolkitError):
    """A checkpoint that is missing, damaged or of another network."""


class TrainingError(ToolkitError):
    """A run that cannot go on: the message says at which step and why."""


class StoppedError(ToolkitError):
    """A run that a signal stopped: its checkpoint is saved, and it waits to be started again."""

    exit_code = 85


def exit_code_of(command: Callable[[], int | None], *, debug: bool, who: str = "") -> int:
    """Run `command` and turn how it ends into an exit code, with one line on stderr for a failure.

    `debug` shows the traceback, too. `who` stands before the line: which process speaks, where there are several.

    Returns 0 when the command returns None, else what it returns; a `ToolkitError`'s own code; 1 for an
    operating-system error (a full disk, a read-only folder), which names its file; 130 on Ctrl-C.
    """
    try:
        return command() or 0
    except ToolkitError as error:
        return _say(error, f"{who}{error}", error.exit_code, debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _say(error, f"{who}{place}{error.strerror or error}", 1, debug)
    except KeyboardInterrupt as error:
        return _say(error, f"{who}interrupted", 130, debug)


def _say(error: BaseException, line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return code
