#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: incus_host_info
short_description: Tell whether Incus runs on a machine, and what it lacks if not
version_added: 0.1.0
description:
  - Asks the Incus daemon for its version and storage pools. Where no daemon answers, looks at what is needed
    to install and start one, and whether the kernel can run containers at all.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  assume_started:
    description:
      - Fail when no daemon answers.
    type: bool
    default: false
  image:
    description:
      - Options of M(sottovoce.stack.incus_image_build); given, RV(image) tells whether it would build one.
    type: dict
extends_documentation_fragment:
  - sottovoce.stack.incus
attributes:
  check_mode:
    support: full
    description: Changes nothing.
  diff_mode:
    support: none
    description: Changes nothing.
"""

EXAMPLES = r"""
- name: Look at Incus on this machine
  sottovoce.stack.incus_host_info:
  register: host
"""

RETURN = r"""
reachable:
  description: Whether the daemon answers.
  returned: success
  type: bool
version:
  description: Version of the daemon that answers.
  returned: success
  type: str
pools:
  description: Names of its storage pools.
  returned: success
  type: list
  elements: str
installed:
  description: Whether a daemon is installed here.
  returned: success
  type: bool
init:
  description: How services are started here, V(systemd) or V(sysvinit).
  returned: success
  type: str
backports_release:
  description: Suite to install Incus from; empty means the release itself has it.
  returned: success
  type: str
backports_source:
  description: The deb822 stanza to be added for it; empty if it is among the host's sources already.
  returned: success
  type: str
image:
  description: What M(sottovoce.stack.incus_image_build) in check mode returns.
  returned: when O(image) is given and the daemon answers
  type: dict
blocker:
  description: Why nothing can be done here, with what to do; empty if nothing is in the way.
  returned: success
  type: str
"""


import os

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.sottovoce.stack.plugins.module_utils import _apt_sources as apt
from ansible_collections.sottovoce.stack.plugins.module_utils import _image_build as image_build
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_host as host
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    CONNECTION_SPEC,
    Endpoint,
    IncusClient,
    IncusError,
    IncusForbidden,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **CONNECTION_SPEC,
            "assume_started": {"type": "bool", "default": False},
            "image": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    params = module.params
    asked = (
        ArgumentSpecValidator(image_build.LOOK_SPEC).validate(params["image"]) if params["image"] else None
    )
    if asked and asked.error_messages:
        module.fail_json(msg=f"image: {'; '.join(asked.error_messages)}")
    result = {
        "changed": False,
        "reachable": False,
        "version": "",
        "pools": [],
        "installed": bool(host.find_daemon()),
        "init": host.init_system(),
        "backports_release": "",
        "backports_source": "",
        "blocker": "",
    }
    try:
        with IncusClient(Endpoint.from_params(params), timeout=params["timeout"]) as client:
            server = client.server()
            if server.get("auth") != "trusted":
                raise IncusForbidden(f"Incus on {client.endpoint.where} does not trust this user.")
            names = [str(url).rpartition("/")[2] for url in client.get("/1.0/storage-pools").metadata or []]
            result.update(
                reachable=True,
                version=str(server["environment"]["server_version"]),
                pools=names,
                installed=True,
            )
            if asked:
                result["image"] = image_build.look(client, asked.validated_parameters).result
    except IncusForbidden as error:
        result.update(installed=True, blocker=forbidden(error))
    except IncusError as error:
        own = params["remote_url"] or params["socket"] or {"INCUS_DIR", "INCUS_SOCKET"} & set(os.environ)
        if params["assume_started"] or own:
            # Another machine's daemon, or one of the user's own: not ours to install or start.
            result["blocker"] = str(error)
        else:
            result.update(what_is_missing(bool(result["installed"])))
    if result["blocker"] and params["assume_started"]:
        module.fail_json(msg=result["blocker"])
    module.exit_json(**result)


def forbidden(error: IncusError) -> str:
    return (
        f"{error} Right after the installation, `sg incus-admin -c 'ansible-playbook …'` does it without"
        " logging in again."
    )


def what_is_missing(installed: bool) -> dict[str, str]:
    problems = host.kernel_problems()
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        return {"blocker": f"This machine cannot run Incus containers:{lines}"}
    if installed:
        return {}
    try:
        with open("/etc/os-release", encoding="utf-8") as handle:
            release = apt.parse_os_release(handle.read())
    except OSError:
        release = {}
    plan = host.install_plan(release)
    if not plan.supported:
        return {"blocker": plan.why}
    if not plan.backports:
        return {}
    codename = plan.backports.removesuffix("-backports")
    source = apt.backports_source(apt.read_sources(), codename)
    if source is None:
        return {
            "blocker": f"Incus for this release is in {plan.backports}, but there is no apt source of"
            f" {codename} under /etc/apt to take the mirror from. Add {plan.backports} and run again."
        }
    return {"backports_release": plan.backports, "backports_source": source}


if __name__ == "__main__":
    main()
