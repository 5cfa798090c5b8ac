#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_userland
short_description: Have NVIDIA libraries in a container that match the driver of its host
version_added: 0.1.0
description:
  - Looks at the device nodes of the GPU, at the version of the kernel's driver and at the libraries.
  - Libraries that match exactly, mounted by C(nvidia.runtime) or from packages, are left as they are.
  - Otherwise, on the machine that Ansible runs on, its own libraries are copied to C(/opt/nvidia) in the
    container. After an upgrade of the driver they are replaced.
  - Where that cannot be done, O(packages) finds the packages of exactly that version.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  instance:
    description: Name of the instance, for messages.
    type: str
    required: true
  project:
    description: Incus project of the instance, for messages.
    type: str
    default: ""
  driver:
    description: Version of the host's driver; empty means that C(/proc/driver/nvidia/version) tells it.
    type: str
    default: ""
  library_path:
    description:
      - Folder of the controller with the libraries, such as an unpacked installer of the driver.
      - Empty means those of the system, when it is the host of the container.
    type: str
    default: ""
  required:
    description: Whether a GPU that cannot be used is an error, or only told in RV(problems).
    type: bool
    default: true
  packages:
    description: Look for packages of the driver's version in the sources of apt, and copy nothing.
    type: bool
    default: false
  why_not_copied:
    description: Reason why nothing could be copied, for messages.
    type: str
    default: ""
  src:
    description: Folder on the target with what the controller sent. Set by the action plugin.
    type: path
  files:
    description: Names in O(src) and their SHA-256. Set by the action plugin.
    type: dict
    default: {}
attributes:
  check_mode:
    support: full
    description: Can run in check_mode and return changed status prediction without modifying target.
  diff_mode:
    support: full
    description: Shows driver and source of the libraries before and after.
  action:
    support: full
    description: The controller finds and sends its own libraries.
  platform:
    support: full
    platforms: linux
    description: Target OS this module runs on.
"""

EXAMPLES = r"""
- name: Have a userland that matches the driver
  sottovoce.stack.gpu_userland:
    instance: "{{ inventory_hostname }}"
"""

RETURN = r"""
vendor:
  description: Maker of the card, one of V(nvidia), V(amd), V(other), or nothing without a card.
  returned: success
  type: str
driver:
  description: Version of the kernel's NVIDIA driver; empty if it cannot be read.
  returned: success
  type: str
source:
  description: Origin of matching libraries, one of V(mounted), V(packages), V(copied); empty without them.
  returned: success
  type: str
nodes:
  description: Device nodes of GPUs and their permission bits.
  returned: success
  type: dict
problems:
  description: What keeps programs from the GPU, with what to do.
  returned: success
  type: list
  elements: str
notes:
  description: What else is worth knowing.
  returned: success
  type: list
  elements: str
removed:
  description: Versions of the userland that were removed.
  returned: success
  type: list
  elements: str
install:
  description: Packages (name=version) to install, with O(packages).
  returned: with O(packages)
  type: list
  elements: str
why_not_copied:
  description: Reason why the controller's libraries could not be copied.
  returned: when a userland is missing
  type: str
"""

import platform
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_userland as userland


def exact_packages(module: AnsibleModule, driver: str) -> list[str]:
    """Ask apt for packages of exactly this driver."""
    names = [name for names in userland.package_sets(driver) for name in names]
    if not module.get_bin_path("apt-cache"):
        raise userland.UserlandError("it has no apt")
    _code, told, _error = module.run_command(["apt-cache", "madison", *names])
    return userland.choose_packages(driver, told)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "instance": {"type": "str", "required": True},
            "project": {"type": "str", "default": ""},
            "driver": {"type": "str", "default": ""},
            "library_path": {"type": "str", "default": ""},
            "required": {"type": "bool", "default": True},
            "packages": {"type": "bool", "default": False},
            "why_not_copied": {"type": "str", "default": ""},
            "src": {"type": "path"},
            "files": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params, root = module.params, Path("/")
    found = userland.look(root, platform.machine(), params["driver"])
    plan = userland.decide(found, params["instance"], params["project"])
    driver = found["driver"]
    result = {
        "changed": False,
        "driver": driver,
        "removed": [],
        **{key: plan[key] for key in ("vendor", "source", "problems", "notes")},
        **{key: found[key] for key in ("nodes", "machine", "boot_id")},
    }
    if plan["problems"] and params["required"]:
        module.fail_json(**{**result, "msg": " ".join(plan["problems"])})
    try:
        if plan["install"] and params["packages"]:
            try:
                module.exit_json(**{**result, "install": exact_packages(module, driver)})
            except userland.UserlandError as error:
                reasons = "; ".join(reason for reason in (params["why_not_copied"], str(error)) if reason)
                advice = f"{userland.remedies(driver, params['instance'])} ({reasons})"
                if params["required"]:
                    module.fail_json(**{**result, "msg": advice})
                module.exit_json(**{**result, "install": [], "problems": [advice]})
        if plan["install"] and not params["files"]:
            # The action plugin sends the files of the controller now.
            module.exit_json(**{**result, "wants_files": True})
        if plan["install"]:
            result["source"] = "copied"
        if not result["source"]:
            module.exit_json(**result)
        after = {"driver": driver, "source": result["source"]}
        result["diff"] = {
            "before_header": f"/{userland.STAMP}",
            "after_header": f"/{userland.STAMP}",
            "before": f"{found['recorded'] or 'absent'}\n",
            "after": f"{after}\n",
        }
        result["changed"] = plan["install"] or plan["remove"] or found["recorded"] != after
        if module.check_mode:
            module.exit_json(**result)
        if plan["install"]:
            result["removed"] = userland.install(root, driver, Path(params["src"]), params["files"])
        elif plan["remove"]:
            result["removed"] = userland.remove(root)
        if plan["install"] or plan["remove"]:
            module.run_command(["ldconfig"], check_rc=True)
        userland.record(root, driver, result["source"])
    except (userland.UserlandError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
