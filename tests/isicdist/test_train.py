"""The loop: the same science on any number of processes, resumed or not, and a run folder that is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WORKER = Path(__file__).parent / "train_worker.py"
SMALL = ("--batch.global-size", 6, "--model.base-channels", 4, "--optim.ema-decay", 0.9, "--log-every", 1)
SMALL += ("--augment.progressive-resize-fraction", 0.4)


def lines(run: Path, event: str) -> list[dict]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in events if entry["event"] == event]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint and, as `ema.NAME`, their moving average."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    means = load_file(folder / "ema.safetensors")
    return {**load_file(folder / "model.safetensors"), **{f"ema.{name}": mean for name, mean in means.items()}}


@pytest.fixture(scope="module")
def whole(python, shard_set, tmp_path_factory) -> Path:
    """12 steps on one process, with a checkpoint every 4."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    words = ("--steps", 12, "--epochs", 9, "--eval-every", 4, "--checkpoint-every", 4, "--keep", 9, *SMALL)
    words += ("--tracker", "wandb", "tensorboard")
    done = python("-m", "isicdist", "train", "--data", shard_set, "--run", run, *words, env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_leaves_what_the_design_names(whole, shard_set):
    index = json.loads((shard_set / "index.json").read_text())
    config = json.loads((whole / "config.json").read_text())
    assert config["data_digest"] == index["digest"]
    assert config["world_size"] == 1
    assert config["batch"]["global_size"] == 6
    assert config["dataset"]["splits"] == {name: split["samples"] for name, split in index["splits"].items()}
    assert config["dataset"]["counts"]["packed"] == index["counts"]["packed"]
    train = lines(whole, "train")
    assert [line["step"] for line in train] == list(range(1, 13))
    keys = "event step epoch samples loss pooled_dice lr grad_norm images_per_s data_wait skipped memory_bytes"
    assert set(train[0]) == set(keys.split())
    per_epoch = -(-index["splits"]["train"]["samples"] // 6)
    assert train[per_epoch - 1]["samples"] == index["splits"]["train"]["samples"]  # the short step counts its own
    evaluated = lines(whole, "evaluate")
    assert {line["n"] for line in evaluated} == {index["splits"]["val"]["samples"]}
    best = json.loads((whole / "best" / "model.json").read_text())
    assert best["score"]["mean_dice"] == max(line["mean_dice"] for line in evaluated)
    means = load_file(whole / "best" / "model.safetensors")
    kept = weights(whole, best["step"])
    assert all(torch.equal(mean, kept[f"ema.{name}"]) for name, mean in means.items())
    assert not torch.equal(kept["stem.weight"], kept["ema.stem.weight"])
    assert list((whole / "wandb").glob("offline-run-*"))


def test_a_dashboard_gets_every_step_and_the_same_images_at_each_evaluation(whole):
    board = EventAccumulator(str(whole / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in lines(whole, "train")]
    )
    evaluated = lines(whole, "evaluate")
    assert [(event.step, event.value) for event in board.Scalars("val/mean_dice")] == [
        (line["step"], pytest.approx(line["mean_dice"])) for line in evaluated
    ]
    samples = {event.step: event.value for event in board.Scalars("samples")}
    assert samples == {line["step"]: line["samples"] for line in lines(whole, "train")}
    tables = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("val/fixed/text_summary")]
    keys = [[line.split("|")[1] for line in table.splitlines()] for table in tables]
    assert len(keys) == len(evaluated) == 3
    assert keys[0] == keys[1] == keys[2]
    assert len(board.Images("val/fixed")) == len(board.Images("val/worst")) == 3


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(python, shard_set, whole, tmp_path):
    run = tmp_path / "resumed"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000004")
    words = ("--steps", 12, "--epochs", 9, "--eval-every", 4, "--checkpoint-every", 4, "--keep", 1, *SMALL)
    done = python("-m", "isicdist", "train", "--data", shard_set, "--run", run, *words)
    assert done.returncode == 0, done.stderr
    assert "resumed from step-00000004" in done.stdout
    changed = [line for line in done.stdout.splitlines() if line.startswith("changed since step-00000004: ")]
    assert [line.split(": ")[1] for line in changed] == ["keep 9 -> 1", "tracker ['wandb', 'tensorboard'] -> ['wandb']"]
    measures = ("step", "epoch", "samples", "loss", "lr", "grad_norm", "pooled_dice")
    kept = [{name: line[name] for name in measures} for line in lines(whole, "train")[4:]]
    assert [{name: line[name] for name in measures} for line in lines(run, "train")] == kept
    one, other = weights(whole, 12), weights(run, 12)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000012"]


def test_another_global_batch_goes_on_to_the_same_epoch(python, shard_set, tmp_path):
    run, words = tmp_path / "run", ("--data", shard_set, *SMALL[2:], "--optim.schedule", "paper")
    for epochs, size in ((1, 6), (2, 12), (2, 4)):
        done = python("-m", "isicdist", "train", "--run", run, *words, "--epochs", epochs, "--batch.global-size", size)
        assert done.returncode == 0, done.stderr
    assert "nothing is left to train" in done.stdout
    train = lines(run, "train")
    n = json.loads((shard_set / "index.json").read_text())["splits"]["train"]["samples"]
    assert train[-1]["samples"] == 2 * n
    assert len(train) == -(-n // 6) + -(-n // 12)
    assert {line["lr"] for line in train if line["epoch"]} == {train[0]["lr"] * 0.985}


def test_a_damaged_checkpoint_is_passed_over_and_named(python, shard_set, whole, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(whole / "checkpoints", run / "checkpoints")
    (run / "checkpoints" / "step-00000012" / "optimizer.pt").write_bytes(b"cut")
    words = ("--steps", 9, "--epochs", 9, *SMALL)
    done = python("-m", "isicdist", "train", "--data", shard_set, "--run", run, *words)
    assert done.returncode == 0, done.stderr
    assert "step-00000012" in done.stdout
    assert "resumed from step-00000008" in done.stdout


def test_a_run_does_not_go_on_with_another_seed_nor_from_damaged_checkpoints_alone(python, shard_set, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000004")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train = ("-m", "isicdist", "train", "--data", shard_set, "--run", run, *SMALL)
    done = python(*train, "--seed", 1)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {run}: trained with seed 0, and cannot go on with 1; choose another --run, or the value as it was\n"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before
    (run / "checkpoints" / "step-00000004" / "ema.safetensors").write_bytes(b"cut")
    done = python(*train)
    assert done.returncode == 1
    assert "ema.safetensors: damaged" in done.stderr
    assert "it is the last one: begin again with another --run" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_rank_refuses_what_the_main_process_refuses(python, shard_set, whole):
    words = ("--seed", 1, "--steps", 12, "--epochs", 9, *SMALL)
    done = python("-m", "isicdist", "train", "--data", shard_set, "--run", whole, *words, processes=2)
    assert done.returncode
    for rank in range(2):
        assert f"error: rank {rank}: {whole}: trained with seed 0, and cannot go on with 1; choose" in done.stderr


def test_a_run_ends_when_patience_does_and_stays_ended(python, shard_set, tmp_path):
    """At a rate of nearly nothing, the second evaluation is no better than the first."""
    run = tmp_path / "run"
    words = ("--data", shard_set, "--run", run, *SMALL, "--optim.lr", 1e-12, "--eval-every", 1, "--patience", 2)
    for said in ("no better score in 2 evaluations: ended at step 3", "resumed from step-00000003"):
        done = python("-m", "isicdist", "train", *words)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        assert [line["step"] for line in lines(run, "evaluate")] == [1, 2, 3]


def together(python, shard_set, tmp_path, dtype: str, cuts: list[tuple[int, int]], *more: object) -> list[Path]:
    """Runs of 20 steps for each (world size, micro batch)."""
    runs = []
    for world, micro in cuts:
        runs.append(tmp_path / f"world-{world}")
        words = ("--steps", 20, "--epochs", 9, "--batch.micro-size", micro, *SMALL, *more)
        done = python(WORKER, dtype, "train", "--data", shard_set, "--run", runs[-1], *words, processes=world)
        assert done.returncode == 0, done.stderr
        assert len(lines(runs[-1], "train")) == 20
    return runs


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in lines(run, "train")], dtype=torch.float64)


def test_three_processes_train_as_one_does_in_float64(python, shard_set, tmp_path):
    """Invariant 4, augmentation and dropout on; micro batches of 4 leave places of the 6 samples masked."""
    first, other = together(python, shard_set, tmp_path, "float64", [(1, 4), (3, 1)])
    torch.testing.assert_close(losses(first), losses(other), rtol=0, atol=1e-9)
    one, other = weights(first, 20), weights(other, 20)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-9)


def test_two_processes_lose_as_one_does_in_float32(python, shard_set, tmp_path):
    """To 1e-5 at a small rate: rounding of 1e-7 flips some LeakyReLU's side, and the gradient moves by 1e-3."""
    first, other = together(python, shard_set, tmp_path, "float32", [(1, 6), (2, 3)], "--optim.lr", 1e-5)
    torch.testing.assert_close(losses(first), losses(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "env", "code", "said"),
    [
        (("--data", "nowhere"), {}, 1, "nowhere: there is no such folder"),
        (("--optim.lr", "0"), {}, 2, "optim.lr is 0.0: give a positive rate"),
        (("--recipe", "papr"), {}, 2, "did you mean paper?"),
        (("--optim.lrr", "1"), {}, 2, "Did you mean --optim.lr?"),
        ((), {"WORLD_SIZE": "4"}, 2, "WORLD_SIZE is 4, but accelerate has set up 1 process"),
        ((), {"ACCELERATE_MIXED_PRECISION": "fp16"}, 2, "fp16 needs a GPU"),
    ],
)
def test_a_mistake_is_one_line(python, shard_set, tmp_path, words, env, code, said):
    data = () if "--data" in words else ("--data", shard_set)
    done = python("-m", "isicdist", "train", *data, "--run", tmp_path / "run", *words, env=env)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_first_steps_see_fewer_pixels_where_the_config_says_so(python, shard_set, whole, tmp_path):
    """`whole` begins small; the same weights have another loss on the same samples with all of their pixels."""
    first = {}
    for share in (0.4, 0.0):
        words = ("--steps", 1, "--run", tmp_path / str(share), *SMALL[:-1], share)
        done = python("-m", "isicdist", "train", "--data", shard_set, *words)
        assert done.returncode == 0, done.stderr
        first[share] = lines(tmp_path / str(share), "train")[0]["loss"]
    assert first[0.4] == lines(whole, "train")[0]["loss"] != first[0.0]


@pytest.mark.parametrize(("side", "small"), [(512, 384), (128, 96), (80, 48), (48, 32), (32, 32)])
def test_small_steps_have_about_three_quarters_of_the_side_in_whole_strides(side, small):
    from isicdist.training.micro_batch import training_side

    assert training_side(side, small=True) == small
    assert training_side(side, small=False) == side


def test_a_split_that_cannot_be_trained_on_is_refused(shard_set):
    from isicdist.training.micro_batch import check_split
    from shards.errors import UsageError
    from shards.reader import ShardSet

    split = ShardSet.open(shard_set).split("train")
    assert check_split(split, len(split)) == split.size == 64
    with pytest.raises(UsageError, match=f"{len(split) + 1} processes for {len(split)} training samples"):
        check_split(split, len(split) + 1)
    for size, message in ((None, "build a set for training with --size N"), (40, "--size 32"), (16, "--size 32")):
        split.size = size
        with pytest.raises(UsageError, match=message):
            check_split(split, 1)


def test_the_default_recipe_trains_on_the_smallest_images(python, archive, tmp_path):
    from shards.build import BuildOptions, build

    data = tmp_path / "set"
    options = BuildOptions(size=32, split="train=0.8,val=0.2")
    build(str(archive[0]), str(archive[1]), data, options)
    words = ("train", "--data", data, "--run", tmp_path / "run", "--steps", 2, "--model.base-channels", 2)
    done = python("-m", "isicdist", *words)
    assert done.returncode == 0, done.stderr
