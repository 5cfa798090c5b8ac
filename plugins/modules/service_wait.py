#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: service_wait
short_description: Wait until a daemon answers its health URL
version_added: 0.1.0
description:
  - Asks the URL on the target until it answers with an expected status.
  - Does not wait any longer once systemd says that the unit has failed.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  name:
    description: Unit without C(.service).
    type: str
    required: true
  url:
    description: Health URL as seen from the target.
    type: str
    required: true
  status:
    description: Status codes that mean healthy.
    type: list
    elements: int
    default: [200]
  timeout:
    description: Seconds to wait.
    type: float
    default: 120
attributes:
  check_mode:
    support: full
    description: Changes nothing.
  diff_mode:
    support: none
    description: Changes nothing.
"""

EXAMPLES = r"""
- name: Wait for Ollama
  sottovoce.stack.service_wait:
    name: ollama
    url: http://127.0.0.1:11434/api/version
"""

RETURN = r"""
seconds:
  description: How long it took, in seconds.
  returned: always
  type: float
health:
  description: What the URL answered, when that was a JSON object.
  returned: success
  type: dict
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _service_health as health


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "url": {"type": "str", "required": True},
            "status": {"type": "list", "elements": "int", "default": [200]},
            "timeout": {"type": "float", "default": 120},
        },
        supports_check_mode=True,
    )
    name, url = module.params["name"], module.params["url"]

    def unit_state() -> str:
        _rc, out, _err = module.run_command(["systemctl", "show", "--value", "--property=ActiveState", name])
        return str(out).strip()

    started = time.monotonic()
    outcome = health.wait_healthy(
        fetch=lambda: health.fetch_json(url, 5),
        unit_state=unit_state,
        expected=module.params["status"],
        timeout=module.params["timeout"],
    )
    seconds = round(time.monotonic() - started, 2)
    if outcome.problem:
        module.fail_json(msg=f"{name} is not healthy: {url}: {outcome.problem}", seconds=seconds)
    module.exit_json(changed=False, seconds=seconds, health=outcome.health)


if __name__ == "__main__":
    main()
