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
