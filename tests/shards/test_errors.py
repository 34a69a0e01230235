"""The tree of exceptions, and what they carry across processes."""

from __future__ import annotations

import pickle

from isicdist.errors import CheckpointError, StoppedError, TrainingError
from shards import errors
from shards.errors import CorruptShardError, ShardSetError, SourceError, ToolkitError, UsageError
from shards.inputs.match import BadInputError


def test_every_class_is_drawn_in_the_tree_with_its_exit_code():
    tree = (errors.__doc__ or "").splitlines()
    classes = (
        UsageError, SourceError, BadInputError, ShardSetError, CorruptShardError,
        CheckpointError, TrainingError, StoppedError,
    )  # fmt: skip
    for each in classes:
        (line,) = (line for line in tree if f"── {each.__name__} " in line)
        assert line.endswith(f"exit {each.exit_code}") == (each.exit_code != ToolkitError.exit_code)


def test_a_corrupt_shard_is_named_after_it_crossed_a_process():
    error = CorruptShardError("damaged", shard="train/000000.tar", key="ISIC_0000003", member="jpg")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.shard, copy.key, copy.member) == ("damaged", "train/000000.tar", "ISIC_0000003", "jpg")
