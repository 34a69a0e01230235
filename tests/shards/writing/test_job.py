"""A job that another machine takes up: it checks that it sees the same sources and the same target."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from shards.errors import ToolkitError
from shards.inputs.source import FolderSource, ZipSource
from shards.planning.plan import BuildOptions
from shards.writing.job import PLAN, Job
from shards.writing.records import write_record
from shards.writing.target import FolderTarget


def test_a_machine_that_sees_other_things_says_so(tmp_path: Path):
    target, options = FolderTarget(tmp_path / "set"), BuildOptions()
    (tmp_path / "in").mkdir()
    job = Job(target=target, sources=[FolderSource(str(tmp_path / "in"))], options=options, identity={"seed": 0})
    with pytest.raises(ToolkitError, match=r"does not see what this machine does \(.*plan\.json"):
        job.check_access()
    with target.lock():
        write_record(target, PLAN, {"seed": 0})
        job.check_access()
        write_record(target, PLAN, {"seed": 1})
        with pytest.raises(ToolkitError, match="sees another build"):
            job.check_access()
        (tmp_path / "in").rmdir()
        with pytest.raises(ToolkitError, match="in: there is no such folder"):
            job.check_access()


def test_a_job_can_be_sent_without_its_open_files(pictures: Path, tmp_path: Path):
    archive = ZipSource(shutil.make_archive(str(tmp_path / "in"), "zip", pictures))
    files = archive.files(0)  # which opens it
    job = Job(target=FolderTarget(tmp_path), sources=[archive], options=BuildOptions(), identity={})
    sent: Job = pickle.loads(pickle.dumps(job))
    assert (sent.target, sent.options, sent.identity) == (job.target, job.options, job.identity)
    assert sent.sources[0].location == archive.location
    assert sent.sources[0].files(0) == files
    sent.close()
    job.close()
