#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: incus_storage_pool
short_description: Have an Incus storage pool, and adopt one that is there
version_added: 0.1.0
description:
  - Creates a storage pool when there is none of that name.
  - A pool that exists is adopted as it is, whatever its driver, size or configuration; it is never changed
    and never removed.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  name:
    description: Name of the pool.
    type: str
    default: default
  driver:
    description:
      - Storage driver of a new pool.
      - V(auto) makes a btrfs file system in a loop file, or V(dir) where btrfs cannot be made.
    type: str
    default: auto
    choices: [auto, btrfs, dir, lvm, zfs]
  size:
    description:
      - Size of the loop file, for example V(50GiB). It is sparse.
      - Empty means 60 % of the free space below Incus' folder, at most 200 GiB.
    type: str
    default: ""
  source:
    description: Block device, folder or dataset for the pool, instead of a loop file.
    type: str
    default: ""
  config:
    description: Further configuration of a new pool.
    type: dict
    default: {}
  description:
    description: Description of a new pool.
    type: str
    default: ""
extends_documentation_fragment:
  - sottovoce.stack.incus
attributes:
  check_mode:
    support: full
    description: Says whether a pool would be created, and how.
  diff_mode:
    support: full
    description: Shows the pool before and after.
"""

EXAMPLES = r"""
- name: Have a storage pool
  sottovoce.stack.incus_storage_pool:
    name: default

- name: Have a pool on a disk of its own
  sottovoce.stack.incus_storage_pool:
    name: fast
    driver: btrfs
    source: /dev/nvme1n1
"""

RETURN = r"""
name:
  description: Name of the pool.
  returned: success
  type: str
driver:
  description: Driver of the pool that is there (or would be).
  returned: success
  type: str
adopted:
  description: Whether the pool was there already.
  returned: success
  type: bool
note:
  description: What the user should know, for example why the pool is a plain directory; else empty.
  returned: success
  type: str
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_pool as pools
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    CONNECTION_SPEC,
    Endpoint,
    IncusClient,
    IncusConflict,
    IncusError,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **CONNECTION_SPEC,
            "name": {"type": "str", "default": "default"},
            "driver": {"type": "str", "default": "auto", "choices": ["auto", "btrfs", "dir", "lvm", "zfs"]},
            "size": {"type": "str", "default": ""},
            "source": {"type": "str", "default": ""},
            "config": {"type": "dict", "default": {}},
            "description": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        with IncusClient(Endpoint.from_params(params), timeout=params["timeout"]) as client:
            run(module, client)
    except IncusError as error:
        module.fail_json(msg=str(error))


def run(module: AnsibleModule, client: IncusClient) -> None:
    params = module.params
    name = params["name"]
    found = pools.find_pool(client, name)
    if found is not None:
        if found.get("status") not in (None, "Created"):
            module.fail_json(
                msg=f"The storage pool {name} exists, but its status is {found['status']}. Look at"
                f" `incus storage show {name}` and the daemon's log, and repair or delete it."
            )
        module.exit_json(changed=False, name=name, driver=found["driver"], adopted=True, note="")

    # Where a loop file would lie; only known for a daemon on this machine.
    free = None if client.endpoint.url else pools.free_space(os.path.dirname(client.endpoint.path))
    plan = pools.plan_pool(
        params["driver"],
        params["size"],
        params["source"],
        {key: str(value) for key, value in params["config"].items()},
        pools.drivers_of(client.server()),
        free,
    )
    if not module.check_mode:
        try:
            plan = pools.create_pool(
                client,
                name,
                plan,
                description=params["description"],
                fallback=params["driver"] == "auto" and not params["source"],
            )
        except IncusConflict:
            found = pools.find_pool(client, name)
            if found is None:
                raise
            # Another run was faster.
            module.exit_json(changed=False, name=name, driver=found["driver"], adopted=True, note="")
    if plan.note:
        module.warn(plan.note)
    module.exit_json(
        changed=True,
        name=name,
        driver=plan.driver,
        adopted=False,
        note=plan.note,
        diff={"before": {}, "after": {"name": name, "driver": plan.driver, "config": plan.config}},
    )


if __name__ == "__main__":
    main()
