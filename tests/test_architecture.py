"""Imports go one way: a room imports itself and the rooms below it, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRACT = ("format", "layout", "codecs", "jpeg", "geometry", "files", "tables", "urls", "progress", "errors")
WINGS = ("metrics", "data", "network", "distributed")  # of training; they do not import each other
# The rooms below each room. A command, which is any other module of a package, may import all of it.
BELOW = {
    "shards contract": [],
    "shards.remote": ["shards contract"],
    "shards.reader": ["shards.remote", "shards contract"],
    "shards.inputs": ["shards contract"],
    "shards.planning": ["shards.inputs", "shards contract"],
    "shards.parallel": ["shards.inputs", "shards contract"],
    "shards.writing": ["shards.planning", "shards.parallel", "shards.inputs", "shards contract"],
    "isicdist foundation": [],
    **{f"isicdist.{wing}": ["isicdist foundation"] for wing in WINGS},
    "isicdist.training": [*(f"isicdist.{wing}" for wing in WINGS), "isicdist foundation"],
}
ROOMS = {f"shards.{name}": "shards contract" for name in CONTRACT}
ROOMS |= {f"isicdist.{name}": "isicdist foundation" for name in ("config", "settings_file", "errors", "run_folder")}


def room(module: str) -> str:
    """Name the room of a module: a wing, a group of modules, or the commands of its package."""
    top = ".".join(module.split(".")[:2])
    return ROOMS.get(top, top if top in BELOW else f"{module.split('.')[0]} commands")


def imports() -> dict[str, set[str]]:
    """Map each module of both packages to the modules that it imports, also those imported inside functions."""
    paths = [path for package in ("isicdist", "shards") for path in (ROOT / package).rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names: set[str] = found.setdefault(module, set())
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: write the import with the package's name"
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                names |= {name if name in modules else str(node.module) for name in full}
    return found


def test_a_room_imports_only_rooms_below_it():
    forbidden = [
        f"{module} -> {name}"
        for module, names in imports().items()
        if room(module) in BELOW
        for name in names
        if name.split(".")[0] in ("isicdist", "shards")
        if name != "isicdist"  # the package itself, for its version
        if not (module.startswith("isicdist.") and name.startswith("shards."))
        if room(name) not in (room(module), *BELOW[room(module)])
    ]
    assert not forbidden


def test_shards_imports_neither_torch_nor_isicdist():
    for module, names in imports().items():
        if module.split(".")[0] == "shards":
            assert not {"torch", "isicdist"} & {name.split(".")[0] for name in names}, module


def test_no_modules_import_each_other_in_a_circle():
    packages = {"isicdist", "shards"}  # each imports its public names on demand
    graph = {module: names - packages for module, names in imports().items() if module not in packages}
    graphlib.TopologicalSorter(graph).prepare()
