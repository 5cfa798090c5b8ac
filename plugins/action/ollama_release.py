# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks at the target, and where it lacks the release asked for finds that on the controller."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sottovoce.stack.plugins.module_utils import _ollama_source

display = Display()

# One look: machine, installed release, program that runs now, device nodes of a GPU.
LOOK = "uname -m; readlink /opt/ollama/current || echo; ls /dev/nvidiactl 2>/dev/null || true"

ARGUMENTS = {
    "version": {"type": "str", "required": True},
    "source": {"type": "str", "choices": list(_ollama_source.SOURCES), "default": "auto"},
    "archive": {"type": "str", "default": ""},
    "archive_sha256": {"type": "str", "default": ""},
    "release_url": {"type": "str", "required": True},
    "pins": {"type": "dict", "default": {}},
    "go": {"type": "str", "default": ""},
    "find": {"type": "bool", "default": True},
    "cache_dir": {"type": "str", "default": ""},
    "reach_timeout": {"type": "float", "default": 5},
    "timeout": {"type": "float", "default": 3600},
}


class ActionModule(ActionBase):  # type: ignore[misc]
    """Action plugin of sottovoce.stack.ollama_release."""

    _supports_check_mode = True
    _supports_async = False
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(argument_spec=ARGUMENTS)
        look = self._low_level_execute_command(LOOK)
        lines = str(look.get("stdout", "")).splitlines()
        if look.get("rc", 1) != 0 or len(lines) < 2:
            raise AnsibleActionFail(f"The instance cannot be looked at: {look.get('stderr') or look}")
        machine, link = lines[0].strip(), lines[1].strip()
        arch = _ollama_source.ARCHITECTURES.get(machine)
        if arch is None:
            raise AnsibleActionFail(f"There is no Ollama for {machine}, only for x86_64 and aarch64")
        request = _ollama_source.Request(
            version=args["version"].removeprefix("v"),
            arch=arch,
            source=args["source"],
            archive=args["archive"],
            archive_sha256=args["archive_sha256"],
            release_url=args["release_url"],
            pins=args["pins"],
            go=args["go"],
            cache=args["cache_dir"],
            reach_timeout=args["reach_timeout"],
            timeout=args["timeout"],
            check=bool(self._task.check_mode),
        )
        installed = link.rsplit("/", 1)[-1]
        result: dict[str, Any] = {
            "changed": False,
            "arch": arch,
            "gpu": any(line.startswith("/dev/") for line in lines[2:]),
            "installed": installed,
            "release": installed,
            "install": False,
            "skipped_sources": [],
        }
        if not args["find"] or (installed and _ollama_source.accepted(installed, request)):
            return result
        host = (task_vars or {}).get("inventory_hostname", "")
        found, skipped = _ollama_source.find(request, lambda text: display.display(f"{host}: {text}"))
        result["skipped_sources"] = skipped
        if found is None:
            reasons = "; ".join(f"{item['what']}: {item['why']}" for item in skipped)
            if args["source"] != "auto":
                raise AnsibleActionFail(reasons)
            result["msg"] = reasons
            return result
        result |= {
            "changed": found.fetched,
            "release": found.release,
            "install": True,
            "kind": found.kind,
            "src": found.src,
            "seconds": found.seconds,
        }
        return result
