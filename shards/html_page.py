"""HTML pages of one file, rendered with jinja2: what every page of the toolkit has in common."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def template_environment(*packages: str) -> Environment:
    """Load templates from the folders `templates` of some packages and of this one; all is escaped.

    The first package that has a template wins. A page extends `base.html.j2` of this one.
    """
    # autoescape=True, not select_autoescape(), which decides by the last suffix: .j2.
    return Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "shards")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
