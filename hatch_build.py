"""Build hook: every wheel has a software bill of materials (SBOM, PEP 770) as sboms/isicdist.cdx.json in its metadata.

It names the direct dependencies, each with the extra that asks for it and the version that isicdist is tested with
(constraints.txt). What an installation has may be newer, within the ranges of the wheel's metadata.
"""

from __future__ import annotations

import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.builders.utils import get_reproducible_timestamp
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class SbomHook(BuildHookInterface):
    """Adds the bill of materials to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write it into a temporary folder, and name it to hatchling."""
        self._folder = tempfile.TemporaryDirectory()
        if version == "editable":
            return
        path = Path(self._folder.name) / "isicdist.cdx.json"
        path.write_text(self._bom(), encoding="utf-8")
        build_data["sbom_files"].append(str(path))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the file once it is in the wheel."""
        self._folder.cleanup()

    def _bom(self) -> str:
        core = self.metadata.core
        lines = (Path(self.root) / "constraints.txt").read_text("utf-8")
        pins = {canonicalize_name(name): pin for name, pin in re.findall(r"^([\w.-]+)==(\S+)", lines, re.M)}
        own = _component(core.name, self.metadata.version, ComponentType.APPLICATION)
        own.licenses.add(LicenseExpression(core.license_expression))
        # The same sources give the same wheel: no random number, no time of day.
        bom = Bom(serial_number=uuid5(NAMESPACE_URL, own.purl.to_string()))
        bom.metadata.timestamp = datetime.fromtimestamp(get_reproducible_timestamp(), UTC)
        bom.metadata.component = own
        found: dict[str, Component] = {}
        extras = {"": core.dependencies, **core.optional_dependencies}
        for extra, requirements in extras.items():
            for text in requirements:
                name = Requirement(text).name
                if name == core.name:  # an extra that is made of others
                    continue
                component = found.setdefault(
                    name, _component(name, pins.get(canonicalize_name(name)), ComponentType.LIBRARY)
                )
                component.scope = component.scope or (ComponentScope.OPTIONAL if extra else ComponentScope.REQUIRED)
                component.properties.add(Property(name="isicdist:requirement", value=text))
                if extra:
                    component.properties.add(Property(name="isicdist:extra", value=extra))
        for component in found.values():
            bom.components.add(component)
        bom.register_dependency(own, found.values())
        return JsonV1Dot6(bom).output_as_string(indent=1)


def _component(name: str, version: str | None, kind: ComponentType) -> Component:
    url = PackageURL("pypi", name=name, version=version)
    return Component(name=name, version=version, type=kind, purl=url, bom_ref=url.to_string())
