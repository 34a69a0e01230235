"""The exceptions of both packages, as a tree: for what a user can act on, nothing else is raised.

ToolkitError                 a failure explained in one line                          exit 1
├── UsageError               a flag, a config value or a launch that cannot work      exit 2
├── SourceError              input images or masks: missing, empty, not in pairs
│   └── BadInputError        inputs that a build rejects (`shards.inputs.match`)
├── ShardSetError            a shard set that is missing, incomplete or of another version
│   └── CorruptShardError    damaged bytes in a shard set; has the shard, key and member
├── CheckpointError          missing, damaged or mismatched weights (`isicdist.errors`)
├── TrainingError            a run that cannot continue (`isicdist.errors`)
└── StoppedError             a run stopped by a signal, checkpoint saved (`isicdist.errors`)  exit 85

Every message is one line: what is wrong, where, and what to do about it. A command prints it on stderr without a
traceback (`--debug` shows that) and ends with the class's `exit_code` (`shards.command_line`).
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
    """Input images or masks that are missing, empty, unreadable or not in pairs."""


class ShardSetError(ToolkitError):
    """A shard set that is missing, incomplete, unreachable or written by another version."""


class CorruptShardError(ShardSetError):
    """Damaged bytes in a shard set: they do not have the checksum of the index, or do not decode.

    The position of the damage is attached, so that a caller can leave out one sample:

        try:
            image = split.image(index)
        except CorruptShardError as error:
            logger.warning("skipping %s of %s: %s", error.key, error.shard, error)
    """

    def __init__(
        self, message: str, *, shard: str | None = None, key: str | None = None, member: str | None = None
    ) -> None:
        super().__init__(message)
        self.shard = shard
        """The damaged file, relative to the set (`train/000007.tar`); None: the index, or several files."""
        self.key = key
        """The key of the sample (`ISIC_0000003`); None: not known."""
        self.member = member
        """The member of the sample (`jpg`, `json`, `mask.png`, `original.png`); None: not known."""
