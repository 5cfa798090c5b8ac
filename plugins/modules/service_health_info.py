#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: service_health_info
short_description: Tell how the daemons of this collection on a machine are
version_added: 0.1.0
description:
  - Finds the units that the roles of this collection wrote, asks systemd about all of them at once, and asks
    each running daemon's health URL.
  - Units are found by the section C([X-Sottovoce]) in their unit file, so a role of your own that uses
    P(sottovoce.stack.systemd_service#role) is found as well.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  unit_path:
    description: Folder with the unit files.
    type: path
    default: /etc/systemd/system
  timeout:
    description: Seconds that each health URL has to answer.
    type: float
    default: 3
seealso:
  - module: sottovoce.stack.vram_health
attributes:
  check_mode:
    support: full
    description: Changes nothing.
  diff_mode:
    support: none
    description: Changes nothing.
"""

EXAMPLES = r"""
- name: Ask how the services are
  sottovoce.stack.service_health_info:
  register: health
"""

RETURN = r"""
services:
  description: One entry per unit, by name.
  returned: always
  type: list
  elements: dict
  contains:
    name: {type: str, description: Unit without C(.service).}
    state: {type: str, description: ActiveState of systemd.}
    sub_state: {type: str, description: SubState of systemd.}
    enabled: {type: bool, description: Whether it starts at boot.}
    restarts: {type: int, description: How often systemd started it again.}
    memory_mib: {type: int, description: Memory of its cgroup in MiB; null where not accounted.}
    health: {type: str, description: 'C(ok), C(stopped), C(failed), C(unknown), or the error.'}
    details: {type: dict, description: 'What the daemon says of itself: model, device, version.'}
memory:
  description: Memory of the machine in MiB (C(total_mib), C(available_mib)).
  returned: always
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _service_health as health


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "unit_path": {"type": "path", "default": "/etc/systemd/system"},
            "timeout": {"type": "float", "default": 3},
        },
        supports_check_mode=True,
    )
    units = health.find_units(module.params["unit_path"])
    shown: dict[str, dict[str, str]] = {}
    if units:
        command = ["systemctl", "show", f"--property={','.join(health.PROPERTIES)}", "--"]
        _rc, out, _err = module.run_command(
            command + [f"{unit.name}.service" for unit in units], check_rc=True
        )
        shown = health.parse_show(out)
    with open("/proc/meminfo", encoding="ascii") as handle:
        memory = health.parse_meminfo(handle.read())
    timeout = module.params["timeout"]
    services = [
        health.describe(unit, shown.get(unit.name, {}), lambda url: health.fetch_json(url, timeout))
        for unit in units
    ]
    module.exit_json(changed=False, services=services, memory=memory)


if __name__ == "__main__":
    main()
