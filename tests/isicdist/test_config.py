"""The config: values that defend themselves, names that are nearly right, and who wins."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from isicdist import cli, config
from isicdist.config import AugmentConfig, BatchConfig, ModelConfig, OptimConfig, StreamConfig, TrainConfig
from isicdist.settings_file import load_file, load_recipe, parse_settings, recipes
from shards.errors import UsageError


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """What `isicdist train` would have trained with, call by call."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr("isicdist.train.train", lambda config, data, run: seen.append(config))
    return seen


def train(*words: str) -> int:
    """The exit code of `isicdist train WORDS`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--data", "set", "--run", "run", *words])
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("section", "name", "value", "hint"),
    [
        (BatchConfig, "batch.global_size", 0, "give a number from 1 to 1000000"),
        (BatchConfig, "batch.global_size", 10**11, "give a number from 1 to 1000000"),
        (BatchConfig, "batch.micro_size", 0, "give a number from 1, or auto"),
        (StreamConfig, "stream.workers", 0, "at least 1 thread"),
        (StreamConfig, "stream.prefetch", 0, "at least 1 micro batch"),
        (StreamConfig, "stream.window", -1, "or 0 for all"),
        (StreamConfig, "stream.cache_size", -1, "or 0 for all"),
        (ModelConfig, "model.base_channels", 0, "the paper has 16"),
        (ModelConfig, "model.dropout", 1.0, "a share from 0 to below 1"),
        (OptimConfig, "optim.lr", 0.0, "give a positive rate"),
        (OptimConfig, "optim.lr", float("nan"), "give a positive rate"),
        (OptimConfig, "optim.lr", float("inf"), "give a positive rate"),
        (OptimConfig, "optim.ema_decay", 1.0, "from 0 to below 1"),
        (OptimConfig, "optim.weight_decay", -1.0, "give 0 or more"),
        (OptimConfig, "optim.clip_norm", float("inf"), "give 0 or more"),
        (OptimConfig, "optim.bce_weight", -0.5, "give 0 or more"),
        (AugmentConfig, "augment.progressive_resize_fraction", 1.0, "from 0 to below 1"),
        (AugmentConfig, "augment.rotation", 181.0, "degrees from 0 to 180"),
        (AugmentConfig, "augment.scale", (1.2, 0.8), "the smaller one first"),
        (AugmentConfig, "augment.elastic", 0.5, "from 0 to 0.2"),
        (AugmentConfig, "augment.contrast", (0.0, 1.0), "two positive numbers"),
        (AugmentConfig, "augment.gamma", (0.5, float("inf")), "two positive numbers"),
        (AugmentConfig, "augment.brightness", -0.1, "a shift from 0 to 1"),
        (AugmentConfig, "augment.hue", 181.0, "degrees from 0 to 180"),
        (AugmentConfig, "augment.saturation", (0.0, 1.0), "two positive numbers"),
        (TrainConfig, "seed", -1, "a number from 0"),
        (TrainConfig, "seed", 2**63, "to below 2^63"),
        (TrainConfig, "epochs", 0, "give at least 1"),
        (TrainConfig, "keep", 0, "give at least 1"),
        (TrainConfig, "log_every", 0, "give at least 1"),
        (TrainConfig, "timeout", 0, "give at least 1"),
        (TrainConfig, "timeout", 32 * 24 * 3600, "which is a month"),
        (TrainConfig, "patience", -1, "give 0 or more"),
        (TrainConfig, "max_nonfinite_steps", -1, "give 0 or more"),
        (TrainConfig, "checkpoint_min_seconds", -1, "give 0 or more"),
        (TrainConfig, "steps", -1, "or 0"),
        (TrainConfig, "eval_every", -1, "or 0"),
        (TrainConfig, "checkpoint_every", -1, "or 0"),
    ],
)
def test_a_value_that_cannot_work_is_named_with_the_way_out(section, name, value, hint):
    with pytest.raises(UsageError) as caught:
        section(**{name.split(".")[-1]: value})
    assert str(caught.value).startswith(f"{name} is {value}: ")
    assert hint in str(caught.value)


@pytest.mark.parametrize("tracker", [(), ("wandb", "wandb"), ("none", "wandb")])
def test_dashboards_are_named_once_or_not_at_all(tracker):
    with pytest.raises(
        UsageError, match=f"tracker is {' '.join(tracker) or 'empty'}: name each dashboard once, or none"
    ):
        TrainConfig(tracker=tracker)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochss = 3", "mine.toml: unknown key epochss (did you mean epochs?)"),
        ("[batch]\nglobal_sise = 3", "mine.toml: unknown key batch.global_sise (did you mean global_size?)"),
        ("[optimm]\nlr = 1", "mine.toml: unknown key optimm (did you mean optim?)"),
        ("zzz = 3", "mine.toml: unknown key zzz"),
        ("epochs = 1.5", "mine.toml: epochs is 1.5: give a whole number"),
        ("epochs = '3'", "mine.toml: epochs is '3': give a whole number"),
        ("[batch]\nmicro_size = 2.5", "mine.toml: batch.micro_size is 2.5: give a whole number"),
        ("[augment]\nscale = [0.75]", "mine.toml: augment.scale is [0.75]: give two numbers"),
        ("[augment]\nenabled = 1", "mine.toml: augment.enabled is 1: give true or false"),
        ("batch = 3", "mine.toml: batch is a section"),
        ("[epochs]\nn = 3", "mine.toml: epochs is a value, not a section"),
        ("epochs: 3", "mine.toml: not TOML: "),
        ("epochs = true", "mine.toml: epochs is True: give a whole number"),
        ("[optim]\nlr = true", "mine.toml: optim.lr is True: give a number"),
        (".".join("a" * 31) + " = 1", "mine.toml: not a config (more than "),
        ("#" * 100_001, "mine.toml: not a config (more than "),
        ("seed = " + "9" * 5000, "mine.toml: not TOML: "),
        ("seed = " + "[" * 5000, "mine.toml: not TOML: "),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(text, said):
    with pytest.raises(UsageError) as caught:
        parse_settings(text, "mine.toml")
    assert str(caught.value).startswith(said)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UsageError, match="there is no such config file"):
        load_file(tmp_path / "none.toml")
    (tmp_path / "picture.toml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UsageError, match=r"picture\.toml: not TOML"):
        load_file(tmp_path / "picture.toml")


def test_a_recipe_there_is_none_of():
    names = "demo, isic2018-128, isic2018-256, isic2018-512, paper"
    with pytest.raises(UsageError, match=rf"no recipe 'papr' \(did you mean paper\?\); there are: {names}"):
        load_recipe("papr")


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_what_train_is_given(name, trained):
    assert train("--recipe", name) == 0
    made = trained[0].to_json()
    settings = load_recipe(name)
    assert settings
    for key, value in settings.items():
        if isinstance(value, dict):
            for inner, number in value.items():
                wanted = tuple(number) if isinstance(number, list) else number
                assert made[key][inner] == wanted
        else:
            assert made[key] == value


def test_without_a_recipe_the_default_one_holds(trained):
    assert train() == train("--recipe", cli.DEFAULT_RECIPE) == 0
    assert trained[0] == trained[1] != TrainConfig()


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(trained, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 7\n[optim]\nlr = 0.25\nclip_norm = 3.0\n[augment]\nscale = [0.5, 2.0]\n")
    assert train("--config", str(file), "--optim.lr", "0.125", "--augment.gamma", "1", "2") == 0
    made = trained[0]
    assert made.optim == OptimConfig(lr=0.125, clip_norm=3.0)
    assert made.augment == AugmentConfig(scale=(0.5, 2.0), gamma=(1.0, 2.0))
    assert made.epochs == 7
    assert made.batch == BatchConfig()


def test_a_bad_value_in_a_file_is_one_line_and_exit_2(trained, tmp_path, capsys):
    file = tmp_path / "mine.toml"
    for text, said in (("epochs = 'many'", "many"), ("[model]\ndropout = 1.5", "model.dropout is 1.5")):
        file.write_text(text)
        assert train("--config", str(file)) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not trained


def test_config_and_recipe_together_are_refused(trained, tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 7")
    assert train("--config", str(file), "--recipe", "paper") == 2
    assert "give one of the two" in capsys.readouterr().err
    assert not trained


def test_every_field_is_documented():
    """The docstring under each field is what `isicdist train --help` shows."""
    tree = ast.parse(inspect.getsource(config))
    missing: list[str] = []
    fields = 0
    for section in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        for field, following in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                fields += 1
                text: Any = following.value if isinstance(following, ast.Expr) else None
                if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                    missing.append(f"{section.name}.{ast.unparse(field.target)}")
    assert not missing
    assert fields > 25


def test_no_recipe_is_left_out_of_the_package():
    folder = Path(inspect.getfile(config)).parent / "recipes"
    assert recipes() == sorted(path.stem for path in folder.glob("*.toml"))


def test_an_empty_folder_for_decoded_samples_is_not_the_one_we_are_in():
    with pytest.raises(UsageError, match=r"stream\.decoded_cache is empty: give auto, off or a folder"):
        StreamConfig(decoded_cache="")
