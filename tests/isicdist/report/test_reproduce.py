"""Commands that reproduce a run: the command line parses them to the same settings."""

from __future__ import annotations

import dataclasses
import shlex

from isicdist import cli
from isicdist.config import AugmentConfig, BatchConfig, TrainConfig
from isicdist.report.collect import Evaluation, RunFiles
from isicdist.report.reproduce import evaluate_commands, train_command


def parsed_settings(command: str) -> TrainConfig:
    words = shlex.split(command.replace("\\\n", ""))  # as a shell continues a line
    words = cli._join_switches(words[words.index("isicdist") + 1 :])
    _, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments["settings"]


def test_the_command_trains_with_the_same_settings(tmp_path, make_run):
    config = TrainConfig(
        seed=3,
        epochs=7,
        compile="off",
        batch=BatchConfig(global_size=24, micro_size=4),
        augment=AugmentConfig(enabled=False, scale=(0.5, 2.0), hue=10.0),
    )
    command = train_command(RunFiles.read(make_run(tmp_path / "run", **config.to_json()), name="run"))
    assert parsed_settings(command) == config
    assert command.startswith(
        "ACCELERATE_USE_CPU=true accelerate launch --num_machines 1 --num_processes 2 --multi_gpu "
        "--mixed_precision bf16 "
    )


def test_one_process_on_a_gpu_needs_no_more_than_the_launcher(tmp_path, make_run):
    run = RunFiles.read(make_run(tmp_path / "run", world_size=1, device="NVIDIA H100"), name="run")
    assert train_command(run).startswith("accelerate launch --num_machines 1 --num_processes 1 --mixed_precision bf16")


def test_settings_of_a_later_version_are_left_out(tmp_path, make_run):
    run = RunFiles.read(make_run(tmp_path / "run", unknown_setting=1, max_skipped=4), name="run")
    settings = parsed_settings(train_command(run))
    assert settings.max_nonfinite_steps == 4  # by its old name


def test_every_evaluation_has_its_command(evaluated_runs):
    run = RunFiles.read(evaluated_runs[0], name="run")
    assert evaluate_commands(run) == ["isicdist evaluate --data DIR --checkpoint NEW_RUN --split test"]
    (evaluation,) = run.evaluations.values()
    summary = dataclasses.replace(evaluation.summary, split="fold_2_of_5", data_digest="ab")
    other = dataclasses.replace(run, evaluations={"": Evaluation(folder=evaluation.folder, summary=summary)})
    assert evaluate_commands(other) == [
        "isicdist evaluate --data OTHER_DIR --checkpoint NEW_RUN --fold 2/5  # OTHER_DIR: digest ab"
    ]
