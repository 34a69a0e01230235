"""Files of settings: TOML whose keys are the fields of `TrainConfig`, and the recipes that come with the package."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, cast

from isicdist.config import TrainConfig
from shards.errors import UsageError

MAX_LETTERS = 100_000
_DEEP_NAME = re.compile(r"(?<![\w\"'-])(?:[\w\"'-]+[ \t]*\.[ \t]*){30}")


def recipes() -> list[str]:
    """List the names of the recipes that come with the package."""
    folder = resources.files("isicdist") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> dict[str, Any]:
    """Load the settings of a named recipe. Raises UsageError for an unknown name."""
    if name not in recipes():
        raise UsageError(f"no recipe {name!r}{did_you_mean(name, recipes())}; there are: {', '.join(recipes())}")
    path = resources.files("isicdist") / "recipes" / f"{name}.toml"
    return parse_settings(path.read_text("utf-8"), f"recipe {name}")


def load_file(path: Path) -> dict[str, Any]:
    """Load the settings of a TOML file. Raises UsageError when it is missing, not TOML, or has an unknown key."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such config file")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not TOML: it is not UTF-8 text") from error
    return parse_settings(text, str(path))


def parse_settings(text: str, where: str) -> dict[str, Any]:
    """Parse the settings of a TOML text, every key known to `TrainConfig`; `where` names it in messages."""
    if len(text) > MAX_LETTERS or _DEEP_NAME.search(text):  # or its names take gigabytes
        what = f"more than {MAX_LETTERS} letters, or a name of more than 30 parts"
        raise UsageError(
            f"{where}: not a config ({what}); give a TOML file of settings, as docs/configuration.md has them"
        )
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits, and of deep nesting
        raise UsageError(f"{where}: not TOML: {error}") from error
    _check_keys(TrainConfig, settings, where, "")
    return settings


def _check_keys(section: type, settings: dict[str, Any], where: str, prefix: str) -> None:
    known = {f.name: f for f in dataclasses.fields(section)}
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {prefix}{key}{did_you_mean(key, list(known))}")
        factory = known[key].default_factory
        nested = isinstance(factory, type)
        if nested != isinstance(value, dict):
            raise UsageError(f"{where}: {prefix}{key} is {'a section' if nested else 'a value, not a section'}")
        if isinstance(factory, type):
            _check_keys(factory, value, where, f"{prefix}{key}.")
        else:
            _check_type(str(known[key].type), value, f"{where}: {prefix}{key}")


def _check_type(annotation: str, value: Any, name: str) -> None:
    """Raise UsageError for a value that would be converted to a field's type and mean something else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    pair = cast("list[object]", value) if isinstance(value, list) else []
    checks = {
        "int": (is_number and not isinstance(value, float), "a whole number"),
        "float": (is_number, "a number"),
        "bool": (isinstance(value, bool), "true or false"),
        "Range": (len(pair) == 2, "two numbers, as [0.75, 1.25]"),
    }
    kind, _, others = annotation.partition(" | ")
    if others and isinstance(value, str):  # auto
        return
    holds, what = checks.get(kind, (True, ""))
    if not holds:
        raise UsageError(f"{name} is {value!r}: give {what}")


def did_you_mean(name: str, known: list[str]) -> str:
    """Suggest the nearest known name, as " (did you mean NAME?)"; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
