#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: incus_infra_info
short_description: Tell what is on an Incus server
version_added: 0.1.0
description:
  - Gives projects, networks, machines and GPUs of an Incus server, in a handful of requests whose number
    does not grow with the machines.
attributes:
  check_mode:
    description: Can run in check mode and changes nothing.
    support: full
  diff_mode:
    description: There is nothing to show a difference of.
    support: none
  idempotent:
    description: It only reads.
    support: full
extends_documentation_fragment:
  - sottovoce.stack.incus
options:
  desired:
    description:
      - The declared state, as for M(sottovoce.stack.incus_infra). Then only what carries the mark of its
        C(project_name) is told, and declared machines that are not there have the status C(Missing).
      - Without it, everything on the server is told.
    type: dict
  state:
    description:
      - Also ask every machine for its present addresses, memory and processes. The server needs some
        milliseconds more per machine.
    type: bool
    default: false
  gpus:
    description: Also list the GPUs of the server, and who has them.
    type: bool
    default: true
seealso:
  - module: sottovoce.stack.incus_infra
author:
  - The sottovoce.stack contributors (@sottovoce)
"""

EXAMPLES = r"""
- name: What is there
  sottovoce.stack.incus_infra_info:
    desired: "{{ sottovoce_state }}"
    state: true
  register: server
"""

RETURN = r"""
server:
  description: Name, version, storage driver and system of the server, and whether it is a cluster.
  returned: always
  type: dict
projects:
  description: Name, description, C(managed) (the C(project_name) it is marked with) and config of the
    projects.
  returned: always
  type: list
  elements: dict
networks:
  description: Name, project, type, C(managed), IPv4 address and config of the networks that Incus manages.
  returned: always
  type: list
  elements: dict
instances:
  description:
    - The machines, with name, project, type, status, location, static address, gpu (PCI addresses), cards
      (as M(sottovoce.stack.incus_infra) returns them), C(managed), profiles, config and C(protected).
    - With O(state=true) also C(addresses) per interface, C(memory) (C(usage) and C(total) in bytes) and
      C(processes).
  returned: always
  type: list
  elements: dict
  sample:
    - {name: webui, project: ai-tools, type: container, status: Running, address: 10.120.0.2, gpu: []}
gpus:
  description: PCI address, name, uuid, vendor, driver, capability and (in a cluster) location of the cards,
    and the C(instances) that claim them.
  returned: always
  type: list
  elements: dict
requests:
  description: The number of HTTP requests that were made.
  returned: always
  type: int
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    CONNECTION_SPEC,
    Endpoint,
    IncusClient,
    IncusError,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **CONNECTION_SPEC,
            "desired": {"type": "dict"},
            "state": {"type": "bool", "default": False},
            "gpus": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        with IncusClient(Endpoint.from_params(p), timeout=p["timeout"]) as client:
            result = infra.info(client, p["desired"], live=p["state"], gpus=p["gpus"])
    except IncusError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
