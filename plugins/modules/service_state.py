#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: service_state
short_description: Have a daemon running with its present files, and healthy
version_added: 0.1.0
description:
  - Enables and starts a systemd unit, or disables and stops it.
  - Restarts it when one of its files is newer than its process, so that a run that was cut off between
    writing a file and the restart is made good by the next one.
  - Waits until the health URL answers; when the unit fails or stays silent, the error ends with its journal.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  name:
    description: Unit without C(.service).
    type: str
    required: true
  enabled:
    description: Whether it runs and starts at boot, or neither.
    type: bool
    default: true
  restart:
    description: Restart in any case; for changes that no file in O(files) shows.
    type: bool
    default: false
  files:
    description:
      - Files that the process was started from. Missing ones are left out; of a link its own time counts.
    type: list
    elements: path
    default: []
  health_url:
    description: URL, seen from the target, that answers when the daemon is ready; empty means no wait.
    type: str
    default: ""
  health_status:
    description: Status codes that mean healthy.
    type: list
    elements: int
    default: [200]
  timeout:
    description: Seconds to wait for health.
    type: float
    default: 120
attributes:
  check_mode:
    support: full
    description: A unit that is not there yet counts as one that would be enabled and started.
  diff_mode:
    support: full
    description: Shows the states before and after.
"""

EXAMPLES = r"""
- name: Have Ollama running with its present settings
  sottovoce.stack.service_state:
    name: ollama
    files: [/etc/sottovoce/ollama.env, /etc/systemd/system/ollama.service]
    health_url: http://127.0.0.1:11434/api/version
"""

RETURN = r"""
actions:
  description: 'What was done, of C(daemon-reload), C(enable), C(disable), C(start), C(restart), C(stop).'
  returned: always
  type: list
  elements: str
why:
  description: Why it was restarted.
  returned: when it was
  type: str
health:
  description: What the health URL answered, when that was a JSON object.
  returned: when it was asked
  type: dict
seconds:
  description: How long health took, in seconds.
  returned: when it was asked
  type: float
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _service_health as health
from ansible_collections.sottovoce.stack.plugins.module_utils import _service_state as state


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "enabled": {"type": "bool", "default": True},
            "restart": {"type": "bool", "default": False},
            "files": {"type": "list", "elements": "path", "default": []},
            "health_url": {"type": "str", "default": ""},
            "health_status": {"type": "list", "elements": "int", "default": [200]},
            "timeout": {"type": "float", "default": 120},
        },
        supports_check_mode=True,
    )
    params = module.params
    unit, url = f"{params['name']}.service", params["health_url"]

    def show() -> dict[str, str]:
        command = [
            "systemctl",
            "show",
            "--timestamp=us+utc",
            f"--property={','.join(state.PROPERTIES)}",
            unit,
        ]
        _rc, out, _err = module.run_command(command, check_rc=True, environ_update={"LC_ALL": "C"})
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def fail(problem: str) -> None:
        _rc, journal, _err = module.run_command(
            ["journalctl", f"--unit={unit}", "--no-pager", "--lines=40", "--output=cat"]
        )
        module.fail_json(
            msg=f"{unit} {problem}. Its journal ends with:\n{journal.strip() or '(nothing)'}",
            actions=plan.actions,
        )

    before = show()
    plan = state.decide(
        before,
        enabled=params["enabled"],
        restart=params["restart"],
        newest=state.newest(params["files"]),
        check_mode=module.check_mode,
    )
    if plan.missing:
        module.fail_json(msg=f"{unit} is not on this machine; write its unit file first")
    result = {
        "changed": bool(plan.actions),
        "actions": plan.actions,
        "diff": {"before": state.describe(before), "after": state.wanted(params["enabled"])},
    }
    if plan.why:
        result["why"] = plan.why
    if not module.check_mode:
        for action in plan.actions:
            words = [action] if action == "daemon-reload" else [action, unit]
            rc, _out, err = module.run_command(["systemctl", "--quiet", *words])
            if rc:
                fail(f"could not {action}: {err.strip()}")
    if params["enabled"] and url and not (module.check_mode and plan.actions):
        started = time.monotonic()
        outcome = health.wait_healthy(
            fetch=lambda: health.fetch_json(url, 5),
            unit_state=lambda: show().get("ActiveState", ""),
            expected=params["health_status"],
            timeout=params["timeout"],
        )
        if outcome.problem:
            fail(f"is not healthy: {url}: {outcome.problem}")
        result.update(health=outcome.health, seconds=round(time.monotonic() - started, 2))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
