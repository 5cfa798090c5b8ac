#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: incus_infra
short_description: Bring an Incus server to a declared state
version_added: 0.1.0
description:
  - Reads what is on an Incus server in a handful of requests, compares it with a whole declared state, and
    carries out the difference, in the order of dependencies and in parallel. The number of requests that
    find out that nothing is to do does not grow with the number of machines.
  - The declared state comes from the inventory plugin P(sottovoce.stack.infra#inventory) as the variable
    C(sottovoce_state).
  - Everything that is created carries the mark C(user.sottovoce.project). What does not carry it is never
    changed or removed. On marked objects only keys that are declared, or were when this module last wrote
    the object, are touched.
  - What is protected against deletion is never deleted.
attributes:
  check_mode:
    description: Can run in check mode and tell what a real run would do.
    support: full
  diff_mode:
    description: Shows what is changed, per resource.
    support: full
  idempotent:
    description: A second run with the same state changes nothing.
    support: full
extends_documentation_fragment:
  - sottovoce.stack.incus
options:
  desired:
    description:
      - The whole state, with the keys C(project_name), C(projects), C(networks), C(profiles), C(volumes),
        C(instances) and C(gpu_policy).
    type: dict
    required: true
  state:
    description:
      - V(present) creates and corrects what is declared.
      - V(absent) removes everything that carries the mark of this C(project_name), declared or not, except
        what is protected, what data is in (see O(prune_volumes)), and what these stand on.
    type: str
    choices: [present, absent]
    default: present
  prune:
    description:
      - With O(state=present), remove what carries the mark of this C(project_name) and is no longer
        declared. Never what is protected or what somebody else uses.
    type: bool
    default: false
  prune_volumes:
    description: Let O(prune) and O(state=absent) remove storage volumes, with the data in them.
    type: bool
    default: false
  protected:
    description:
      - What to do when something to be removed is protected against deletion. V(keep) leaves it, and what
        it stands on, and reports it as skipped with the remedy. V(fail) refuses before anything is changed.
    type: str
    choices: [keep, fail]
    default: keep
  adopt:
    description: Take over objects of the declared names that were not made by this module, or for another
      C(project_name).
    type: bool
    default: false
  storage_pool:
    description: The pool of root disks and volumes that name none.
    type: str
    default: default
  start:
    description:
      - Start machines that are declared to run. With V(false), new machines are made without
        being started, and stopped ones stay stopped.
    type: bool
    default: true
  image_server:
    description: The simplestreams server that images named C(images:…) are fetched from when there is no
      local alias.
    type: str
    default: https://images.linuxcontainers.org
  image_fallback:
    description: A local image alias that is used, and named in RV(notes), when the image server cannot be
      reached.
    type: str
  parallel:
    description: How many resources are worked on at once.
    type: int
    default: 8
  wait_timeout:
    description: How many seconds one operation of the server, such as fetching an image, may take.
    type: int
    default: 600
  lock_timeout:
    description: How many seconds to wait for another run against the same server.
    type: int
    default: 30
seealso:
  - module: sottovoce.stack.incus_infra_info
author:
  - The sottovoce.stack contributors (@sottovoce)
"""

EXAMPLES = r"""
- name: Make the server what infra.yml says
  sottovoce.stack.incus_infra:
    desired: "{{ sottovoce_state }}"

- name: Remove what infra.yml no longer declares, too
  sottovoce.stack.incus_infra:
    desired: "{{ sottovoce_state }}"
    prune: true

- name: One machine by hand
  sottovoce.stack.incus_infra:
    desired:
      project_name: demo
      projects:
        - name: demo
          config: {features.images: "false"}
      networks:
        - name: net-demo
          config: {ipv4.address: 10.120.0.254/24, ipv4.nat: "true", ipv6.address: none}
      instances:
        - project: demo
          name: one
          image: images:debian/13
          profiles: [default]
          ephemeral: true
          devices:
            eth0: {type: nic, name: eth0, network: net-demo, ipv4.address: 10.120.0.1}

- name: Remove everything of this project that is not protected
  sottovoce.stack.incus_infra:
    desired: "{{ sottovoce_state }}"
    state: absent
"""

RETURN = r"""
resources:
  description: What was done (in check mode, would be done) with every resource.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: project, network, volume, profile, image or instance.
      type: str
      returned: always
    project:
      description: The Incus project; empty for projects themselves.
      type: str
      returned: always
    name:
      description: Its name.
      type: str
      returned: always
    action:
      description: created, updated, started, restarted, deleted, unchanged or skipped; failed in a failed
        run.
      type: str
      returned: always
    changes:
      description: Every changed key by its dotted path, with C(before) and C(after).
      type: dict
      returned: always
    why:
      description: Why it was restarted, skipped or failed.
      type: str
      returned: always
    pool:
      description: The storage pool.
      type: str
      returned: for volumes
  sample:
    - {kind: instance, project: ai-tools, name: webui, action: created, changes: {}, why: ""}
instances:
  description:
    - The declared machines, with name, project, static address, status, gpu (PCI addresses) and cards
      (each with pci, name, uuid, vendor, capability, driver and mig).
  returned: always
  type: list
  elements: dict
  sample:
    - name: gpu-server
      project: ai-tools
      address: 10.120.0.1
      status: Running
      gpu: ["0000:01:00.0"]
      cards:
        - pci: "0000:01:00.0"
          name: NVIDIA GeForce RTX 3060
          uuid: GPU-0f3a1b2c-1111-2222-3333-444455556666
          vendor: nvidia
          capability: "8.6"
          driver: 570.86.15
          mig: ""
notes:
  description: What a person should know; one line each.
  returned: always
  type: list
  elements: str
requests:
  description: The number of HTTP requests that were made.
  returned: always
  type: int
errors:
  description: Why nothing was changed.
  returned: when the state was refused
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_lock as lock
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
            "desired": {"type": "dict", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "prune": {"type": "bool", "default": False},
            "prune_volumes": {"type": "bool", "default": False},
            "protected": {"type": "str", "choices": ["keep", "fail"], "default": "keep"},
            "adopt": {"type": "bool", "default": False},
            "storage_pool": {"type": "str", "default": "default"},
            "start": {"type": "bool", "default": True},
            "image_server": {"type": "str", "default": infra.IMAGE_SERVER},
            "image_fallback": {"type": "str"},
            "parallel": {"type": "int", "default": 8},
            "wait_timeout": {"type": "int", "default": 600},
            "lock_timeout": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    p = module.params
    options = infra.Options(
        state=p["state"],
        adopt=p["adopt"],
        prune=p["prune"],
        prune_volumes=p["prune_volumes"],
        protected=p["protected"],
        storage_pool=p["storage_pool"],
        start=p["start"],
    )
    settings = infra.Settings(
        image_server=p["image_server"],
        image_fallback=p["image_fallback"] or None,
        parallel=p["parallel"],
        wait_timeout=p["wait_timeout"],
    )
    try:
        endpoint = Endpoint.from_params(p)
        with IncusClient(endpoint, timeout=p["timeout"]) as client:
            if module.check_mode:
                result = infra.reconcile(
                    client, p["desired"], options, settings, check=True, diff=module._diff
                )
            else:
                with lock.hold(lock.lock_path(endpoint.where), p["lock_timeout"]) as waited:
                    result = infra.reconcile(client, p["desired"], options, settings, diff=module._diff)
                if waited:
                    result["notes"].append(waited)
    except infra.InfraError as exc:
        module.fail_json(msg=str(exc), **exc.result)
    except (IncusError, lock.LockError) as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
