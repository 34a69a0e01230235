"""MkDocs hooks: pages from files outside of docs/, and references generated from the code instead of copied."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from isicdist import config as settings
from shards import format

ROOT = Path(__file__).parents[1]
PAGES = {"launch/README.md": "launch.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {f"benchmarks/results/{p.name}": f"results/{p.name}" for p in (ROOT / "benchmarks/results").glob("*.md")}
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of PAGES."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the generated references, and point links between files of the repository to their pages."""
    markdown = markdown.replace("<!-- configuration -->", configuration())
    markdown = markdown.replace("<!-- shards.format -->", f"```text\n{inspect.getdoc(format)}\n```")
    sources = {page_name: path for path, page_name in PAGES.items()}
    here = (ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    depth = "../" * page.file.src_uri.count("/")

    def target(match: re.Match[str]) -> str:
        file = (here / match[1]).resolve()
        path = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else ""
        known = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
        return f"]({depth}{known}{match[2] or ''})" if known else match[0]

    return LINK.sub(target, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Fail for an include of a file that is written so that it is not one, as a formatter of code may do."""
    if "8 &lt;" in html or "8&lt;" in html:
        raise PluginError(f'{page.file.src_uri}: an include (--8<-- "FILE") was not filled in')
    return html


def configuration() -> str:
    """Tabulate the settings of `isicdist train` from the dataclasses of `isicdist.config`."""
    module = griffe.load("isicdist.config", search_paths=[str(ROOT)])
    lines: list[str] = []
    for section in dataclasses.fields(settings.TrainConfig):
        kind = section.default_factory
        if isinstance(kind, type):
            lines += ["", f"## {section.name}", "", str(inspect.getdoc(kind)), "", *_table(kind, module, section.name)]
    return "\n".join(["## Run", "", *_table(settings.TrainConfig, module, ""), *lines])


def _table(kind: Any, module: Any, prefix: str) -> list[str]:
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for each in dataclasses.fields(kind):
        if isinstance(each.default_factory, type):
            continue
        attribute = module[kind.__name__][each.name]
        name = f"{prefix}.{each.name}" if prefix else each.name
        annotation = str(attribute.annotation).replace("|", "\\|")
        meaning = " ".join(attribute.docstring.value.split()).replace("|", "\\|")
        default = json.dumps(list(each.default) if isinstance(each.default, tuple) else each.default)
        rows.append(f"| `{name}` | `{annotation}` | `{default}` | {meaning} |")
    return rows
