#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: systemd_unit
short_description: Have a daemon with its user, files and unit, running as they say, and healthy
version_added: 0.1.0
description:
  - Makes the system user, C(/etc/sottovoce/<name>.env) and C(/etc/systemd/system/<name>.service).
  - Enables and starts the unit, or disables and stops it.
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
  user:
    description:
      - System user, with a group of the same name, that may read the environment file.
      - Created with the home C(/var/lib/<name>) and without a shell; one that exists stays as it is.
    type: str
    required: true
  unit:
    description: Text of the unit file.
    type: str
    required: true
  environment:
    description: Text of the environment file, for root and the group of O(user) to read. It may hold keys.
    type: str
    required: true
  secure_logging:
    description: Keep O(environment) out of logs and diffs.
    type: bool
    default: true
  enabled:
    description: Whether it runs and starts at boot, or neither.
    type: bool
    default: true
  restart:
    description: Restart in any case; for changes that no file shows.
    type: bool
    default: false
  files:
    description:
      - Further files that the process was started from.
      - Missing ones are left out; of a link its own time counts.
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
    description: Without its files a unit counts as one that would be enabled and started.
  diff_mode:
    support: full
    description: Shows both files (the environment only without O(secure_logging)) and the state.
"""

EXAMPLES = r"""
- name: Have Ollama running with its present settings
  sottovoce.stack.systemd_unit:
    name: ollama
    user: ollama
    unit: "{{ lookup('ansible.builtin.template', 'ollama.service.j2') }}"
    environment: |
      OLLAMA_HOST="127.0.0.1:11434"
    health_url: http://127.0.0.1:11434/api/version
"""

RETURN = r"""
actions:
  description: >-
    What was done, of C(useradd), C(write <path>), C(daemon-reload), C(enable), C(disable), C(start),
    C(restart), C(stop).
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

import grp
import os
import pwd
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _service_health as health
from ansible_collections.sottovoce.stack.plugins.module_utils import _systemd_unit as systemd

SETTINGS = "/etc/sottovoce"
UNITS = "/etc/systemd/system"


class Daemon:
    """One daemon on this machine; every method does nothing in check mode."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.unit = f"{module.params['name']}.service"
        self.actions: list[str] = []

    def have_user(self, user: str) -> int:
        """Make the system user; returns its group, -1 when a check finds none."""
        try:
            return pwd.getpwnam(user).pw_gid
        except KeyError:
            self.actions.append("useradd")
        if self.module.check_mode:
            return -1
        known = any(entry.gr_name == user for entry in grp.getgrall())
        group = ["--gid", user] if known else ["--user-group"]
        home = ["--no-create-home", "--home-dir", f"/var/lib/{self.module.params['name']}"]
        command = ["useradd", "--system", *group, *home, "--shell", "/usr/sbin/nologin", user]
        self.module.run_command(command, check_rc=True)
        return pwd.getpwnam(user).pw_gid

    def write(self, path: str, wanted: systemd.Stored, *, hidden: bool) -> dict[str, str] | None:
        """Make the file as wanted; returns the difference, None when there is none."""
        found = systemd.look(path)
        if found == wanted:
            return None
        self.actions.append(f"write {path}")
        if not self.module.check_mode:
            systemd.store(path, wanted)
        return systemd.file_diff(path, found, wanted, hidden=hidden)

    def show(self) -> dict[str, str]:
        """What systemd says of the unit."""
        options = ["--timestamp=us+utc", f"--property={','.join(systemd.PROPERTIES)}"]
        _rc, out, _err = self.module.run_command(
            ["systemctl", "show", *options, self.unit], check_rc=True, environ_update={"LC_ALL": "C"}
        )
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def run(self, action: str) -> None:
        """One verb of systemctl."""
        self.actions.append(action)
        if self.module.check_mode:
            return
        words = [action] if action == "daemon-reload" else [action, self.unit]
        rc, _out, err = self.module.run_command(["systemctl", "--quiet", *words])
        if rc:
            self.fail(f"could not {action}: {err.strip()}")

    def fail(self, problem: str) -> None:
        """End with the journal's last lines."""
        _rc, journal, _err = self.module.run_command(
            ["journalctl", f"--unit={self.unit}", "--no-pager", "--lines=40", "--output=cat"]
        )
        self.module.fail_json(
            msg=f"{self.unit} {problem}. Its journal ends with:\n{journal.strip() or '(nothing)'}",
            actions=self.actions,
        )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "user": {"type": "str", "required": True},
            "unit": {"type": "str", "required": True},
            "environment": {"type": "str", "required": True, "no_log": True},
            "secure_logging": {"type": "bool", "default": True},
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
    hidden, url = params["secure_logging"], params["health_url"]
    if not hidden:
        module.no_log_values.discard(params["environment"])
    daemon = Daemon(module)
    group = daemon.have_user(params["user"])
    if not module.check_mode:
        os.makedirs(SETTINGS, mode=0o755, exist_ok=True)
    files = {
        f"{SETTINGS}/{params['name']}.env": (systemd.Stored(params["environment"], 0o640, 0, group), hidden),
        f"{UNITS}/{daemon.unit}": (systemd.Stored(params["unit"], 0o644, 0, 0), False),
    }
    diffs = [daemon.write(path, wanted, hidden=secret) for path, (wanted, secret) in files.items()]
    diff = [entry for entry in diffs if entry]

    before = daemon.show()
    plan = systemd.decide(
        before,
        enabled=params["enabled"],
        # In check mode the files are not written, so their times tell nothing.
        restart=params["restart"] or bool(diff),
        newest=systemd.newest([*files, *params["files"]]),
        check_mode=module.check_mode,
    )
    if plan.missing:
        module.fail_json(msg=f"systemd does not find {daemon.unit} although {UNITS}/{daemon.unit} is there")
    for action in plan.actions:
        daemon.run(action)
    diff.append({"before": systemd.describe(before), "after": systemd.wanted(params["enabled"])})
    result = {"changed": bool(daemon.actions), "actions": daemon.actions, "diff": diff}
    if plan.why:
        result["why"] = plan.why
    if params["enabled"] and url and not (module.check_mode and plan.actions):
        started = time.monotonic()
        outcome = health.wait_healthy(
            fetch=lambda: health.fetch_json(url, 5),
            unit_state=lambda: daemon.show().get("ActiveState", ""),
            expected=params["health_status"],
            timeout=params["timeout"],
        )
        if outcome.problem:
            daemon.fail(f"is not healthy: {url}: {outcome.problem}")
        result.update(health=outcome.health, seconds=round(time.monotonic() - started, 2))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
