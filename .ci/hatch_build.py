"""Makes dsmq.py a package in the wheel, for only a package can say that it has types.
An editable install is left to use the file itself."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Package(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"] = {
                "dsmq.py": "dsmq/__init__.py",
                ".ci/package": "dsmq",
            }
