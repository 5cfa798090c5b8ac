#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: uv_environment
short_description: Python environment from a hashed lock file, made by uv
version_added: 0.1.0
description:
  - Makes a virtual environment and installs exactly what a lock file says, every package checked by its hash.
  - Records in the environment what it was made of, so that a second run costs the reading of two files.
  - An interrupted installation is noticed and done again from the start; what was downloaded is reused.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  path:
    description:
      - Folder of the environment.
      - A folder that is not empty and no Python environment is refused.
    type: path
    required: true
  requirements:
    description: Lock file on the target, all with hashes (made by C(uv pip compile --generate-hashes)).
    type: path
    required: true
  lock:
    description: Text of that lock file where it is not on the target yet; written there before installing.
    type: str
  python:
    description:
      - Version (V(3.11)) or absolute path of the interpreter.
      - One that is installed on the target is preferred; else uv downloads its own build of that version.
    type: str
    default: "3.11"
  uv:
    description: Path of uv; the role P(sottovoce.stack.uv#role) leaves it in the fact C(uv_bin).
    type: path
    required: true
  sources:
    description:
      - Local wheels, source archives or project folders on the target.
      - They are installed after the lock and without their dependencies.
      - Their content is part of what the environment is made of.
    type: list
    elements: path
    default: []
  build_isolation:
    description:
      - Build O(sources) in an environment of their own.
      - With V(false) the build backend must be in O(requirements).
    type: bool
    default: true
  build_constraints:
    description: Hashed lock of the build tools, for requirements that exist as source archives only.
    type: path
  compile_bytecode:
    description: Compile all modules while installing; otherwise the first start compiles those it uses.
    type: bool
    default: true
  cache_dir:
    description:
      - Cache of uv.
      - On the file system of O(path) its files are linked instead of copied.
    type: path
    default: /var/cache/uv
  link_mode:
    description: How files get from the cache into the environment; left out, uv chooses.
    type: str
    choices: [clone, copy, hardlink, symlink]
  index_url:
    description: Package index to use; left out, the one that uv's own settings on the target name.
    type: str
  python_install_dir:
    description: Where uv puts the interpreters it downloads; must be readable for the user of the program.
    type: path
    default: /opt/uv/python
  python_downloads:
    description: Whether uv may download an interpreter.
    type: bool
    default: true
  system_certs:
    description: Trust the certificates of the system, a company's own included.
    type: bool
    default: true
  http_timeout:
    description: Seconds without data before a download counts as failed; connecting has at most two.
    type: int
    default: 30
  http_retries:
    description:
      - How often a failed request is tried again.
      - An installation that loses its connection after some time of downloading is itself tried twice more.
    type: int
    default: 1
  timeout:
    description: Seconds that one step (making the environment, installing the lock) may take.
    type: int
    default: 1800
attributes:
  check_mode:
    support: full
    description: Can run in check_mode and return changed status prediction without modifying the target.
  diff_mode:
    support: full
    description: Returns the packages before and after.
  platform:
    support: full
    platforms: linux
    description: Target OS this module runs on.
notes:
  - In check mode O(requirements), O(sources) and O(uv) may still be missing.
"""

EXAMPLES = r"""
- name: Install a program from its lock
  sottovoce.stack.uv_environment:
    path: /opt/example/venv
    requirements: /opt/example/requirements.lock
    python: "3.11"
    uv: "{{ uv_bin }}"

- name: The same with a project folder of our own on top
  sottovoce.stack.uv_environment:
    path: /opt/example/venv
    requirements: /opt/example/requirements.lock
    sources:
      - /opt/example/src
    uv: "{{ uv_bin }}"
"""

RETURN = r"""
action:
  description: V(none), V(update) (installed into the environment there was) or V(create) (made anew).
  returned: success
  type: str
  sample: create
reason:
  description: Why.
  returned: success
  type: str
  sample: the environment is not there yet
path:
  description: Folder of the environment.
  returned: success
  type: str
  sample: /opt/example/venv
stderr:
  description: What uv printed.
  returned: when uv failed
  type: str
  sample: "error: Failed to fetch"
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils._uv import (
    Plan,
    Record,
    Settings,
    UvError,
    apply,
    locked_packages,
    look,
    read_inputs,
    result,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "requirements": {"type": "path", "required": True},
            # No secret, but hundreds of kilobytes that no one wants in a log.
            "lock": {"type": "str", "no_log": True},
            "python": {"type": "str", "default": "3.11"},
            "uv": {"type": "path", "required": True},
            "sources": {"type": "list", "elements": "path", "default": []},
            "build_isolation": {"type": "bool", "default": True},
            "build_constraints": {"type": "path"},
            "compile_bytecode": {"type": "bool", "default": True},
            "cache_dir": {"type": "path", "default": "/var/cache/uv"},
            "link_mode": {"type": "str", "choices": ["clone", "copy", "hardlink", "symlink"]},
            "index_url": {"type": "str"},
            "python_install_dir": {"type": "path", "default": "/opt/uv/python"},
            "python_downloads": {"type": "bool", "default": True},
            "system_certs": {"type": "bool", "default": True},
            "http_timeout": {"type": "int", "default": 30},
            "http_retries": {"type": "int", "default": 1},
            "timeout": {"type": "int", "default": 1800},
        },
        supports_check_mode=True,
    )
    settings = Settings(**{**module.params, "sources": tuple(module.params["sources"])})
    needed = [*([settings.requirements] if settings.lock is None else []), *settings.sources]
    if module.check_mode and not all(os.path.exists(name) for name in needed):
        # An earlier task of the same run would have put them there.
        before = Record.load(settings.path)
        plan = Plan("update" if before else "create", "its lock or its sources are not on the target yet")
        module.exit_json(**result(settings, plan, before, before.packages if before else []))
    try:
        inputs, lock = read_inputs(settings)
        plan, before = look(settings.path, inputs.digest(), settings.python)
        packages = locked_packages(lock)
        packages += [f"{source} ({digest[:12]})" for source, digest in inputs.sources.items()]
        if plan.changed and not module.check_mode:
            apply(settings, plan, Record(inputs.digest(), packages))
    except UvError as error:
        module.fail_json(msg=str(error), stderr=error.output)
    module.exit_json(**result(settings, plan, before, packages))


if __name__ == "__main__":
    main()
