"""testinfra over the Incus of this test run: one `incus exec` per command."""

from __future__ import annotations

from typing import Any

import testinfra.host
from testinfra.backend import base


class IncusBackend(base.BaseBackend):  # type: ignore[misc]
    """Runs commands in one instance as root."""

    NAME = "incus"

    def __init__(self, instance: str, project: str, **kwargs: Any) -> None:
        self.instance, self.project = instance, project
        super().__init__(instance, **kwargs)

    def run(self, command: str, *args: str, **_kwargs: Any) -> base.CommandResult:
        text = self.get_command(command, *args)
        return self.run_local(
            "incus exec --project %s %s -- /bin/sh -c %s", self.project, self.instance, text
        )


def host(instance: str, project: str) -> testinfra.host.Host:
    """A testinfra host for an instance."""
    return testinfra.host.Host(IncusBackend(instance, project))
