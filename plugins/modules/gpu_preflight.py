#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_preflight
short_description: Tell what keeps a host's GPU from reaching its machines
version_added: 0.1.0
description:
  - Looks at the cards of the host it runs on, at their drivers and at what Incus needs to hand them over, and
    tells what is wrong, why that matters and what mends it. It changes nothing and needs no C(nvidia-smi).
  - As root it also sees which processes of other users hold a card.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  machines:
    description:
      - The machines that want a card, as the filter P(sottovoce.stack.gpu_machines#filter) makes them.
      - Without it everything is looked at, and what would keep a container from the card is an error.
    type: list
    elements: dict
  container_tools:
    description: Packages that bring C(nvidia-container-cli); apt is asked for them when it is missing.
    type: list
    elements: str
    default: [libnvidia-container-tools]
extends_documentation_fragment:
  - sottovoce.stack.incus
attributes:
  check_mode:
    support: full
    description: Changes nothing.
  diff_mode:
    support: none
    description: Changes nothing.
notes:
  - With O(remote_url) nothing is looked at, because the cards are on another machine; RV(note) says so.
"""

EXAMPLES = r"""
- name: Look at this host's GPU
  sottovoce.stack.gpu_preflight:
    machines: "{{ sottovoce_state | sottovoce.stack.gpu_machines }}"
  register: host

- name: Show what was found
  sottovoce.stack.show_text:
    lines: "{{ host | sottovoce.stack.gpu_report }}"
"""

RETURN = r"""
looked:
  description: Whether the host could be looked at.
  returned: success
  type: bool
note:
  description: Why not.
  returned: success
  type: str
host:
  description: What was looked at, one line for each thing.
  returned: success
  type: list
  elements: str
cards:
  description: Cards of NVIDIA, AMD and Intel on the PCI bus.
  returned: success
  type: list
  elements: dict
  contains:
    pci: {type: str, description: 'Address such as V(0000:01:00.0).'}
    vendor: {type: str, description: 'C(NVIDIA), C(AMD) or C(Intel).'}
    name: {type: str, description: 'Product, if the system has a list of PCI ids.'}
    driver: {type: str, description: 'Kernel driver that is bound; empty if none is.'}
driver:
  description: Version of the loaded NVIDIA kernel module; empty if none is.
  returned: success
  type: str
init:
  description: How services are started here, V(systemd) or V(sysvinit).
  returned: success
  type: str
root:
  description: Folder that was taken for V(/); empty except in tests of this collection.
  returned: success
  type: str
findings:
  description: What was found, the worst first.
  returned: success
  type: list
  elements: dict
  contains:
    id: {type: str, description: 'Name of the finding, as in docs/gpu.md.'}
    severity: {type: str, description: 'C(error), C(warning) or C(info).'}
    what: {type: str, description: What is so.}
    why: {type: str, description: Why it matters.}
    remedy: {type: str, description: What a person does about it.}
    mends: {type: str, description: 'What the role gpu_host does about it; empty if nothing.'}
mendable:
  description: Ids of the findings that the role gpu_host mends.
  returned: success
  type: list
  elements: str
root_at_hand:
  description:
    - Whether there is something to mend and root to do it with, without a password being asked for.
  returned: success
  type: bool
blocking:
  description: Errors that the machines cannot do with, one line each, without those that gpu_host mends.
  returned: success
  type: list
  elements: str
blocking_all:
  description: The same with those that gpu_host mends.
  returned: success
  type: list
  elements: str
notes:
  description: Errors and warnings, one line each.
  returned: success
  type: list
  elements: str
"""


import dataclasses
import os
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_facts as gpu_facts
from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_preflight as preflight
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    CONNECTION_SPEC,
    Endpoint,
    IncusClient,
    IncusError,
)


def ask_incus(endpoint: Endpoint, timeout: float) -> gpu_facts.Incus | None:
    """What the daemon says of itself; None if none answers, which the role incus_host deals with."""
    try:
        with IncusClient(endpoint, timeout=timeout) as client:
            server = client.server()
    except IncusError:
        return None
    environment = server.get("environment") or {}
    if not environment:  # it does not trust this user
        return None
    return gpu_facts.Incus(
        version=str(environment.get("server_version", "")),
        extensions=frozenset(server.get("api_extensions") or []),
        clustered=bool(environment.get("server_clustered")),
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **CONNECTION_SPEC,
            "machines": {"type": "list", "elements": "dict"},
            "container_tools": {"type": "list", "elements": "str", "default": ["libnvidia-container-tools"]},
        },
        supports_check_mode=True,
    )
    params = module.params
    result: dict[str, t.Any] = {
        "changed": False,
        "looked": False,
        "note": "",
        "host": [],
        "cards": [],
        "driver": "",
        "init": "",
        "root": "",
        "findings": [],
        "mendable": [],
        "root_at_hand": False,
        "blocking": [],
        "blocking_all": [],
        "notes": [],
    }
    if params["remote_url"]:
        note = (
            f"The GPU's host is the server {params['remote_url']}, which cannot be looked into from here:"
            " run make doctor there."
        )
        module.exit_json(**{**result, "note": note, "notes": [note]})
    # For tests: a folder that stands for the host.
    root = os.environ.get("SOTTOVOCE_HOST_ROOT") or ""
    endpoint = Endpoint.from_params(params)
    facts = gpu_facts.read_facts(
        root or "/", ask_incus(endpoint, params["timeout"]), params["container_tools"]
    )
    wanted = preflight.wanted_by(params["machines"])
    found = preflight.findings(facts, wanted)
    stops = preflight.blocking(found, facts, wanted)
    mendable = [finding.id for finding in found if finding.mends]
    listed = [dataclasses.asdict(finding) for finding in found]
    result.update(
        looked=True,
        host=preflight.host_lines(facts),
        cards=[
            {
                "pci": card.pci,
                "vendor": gpu_facts.VENDORS[card.vendor],
                "name": card.name,
                "driver": card.driver,
            }
            for card in facts.cards
        ],
        driver=facts.loaded,
        init=facts.init,
        root=root,
        findings=listed,
        mendable=mendable,
        root_at_hand=bool(mendable) and gpu_facts.root_at_hand(),
        blocking=[finding.line() for finding in stops if not finding.mends],
        blocking_all=[finding.line() for finding in stops],
        notes=preflight.notes(listed, wanted.known and not wanted.required),
    )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
