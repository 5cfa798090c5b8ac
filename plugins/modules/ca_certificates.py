#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: ca_certificates
short_description: Trust local certificate authorities, and no longer those that are dropped
version_added: 0.1.0
description:
  - Writes certificates below C(/usr/local/share/ca-certificates), in a folder of its own, and rebuilds the
    system's bundle if anything changed. Files in that folder that are not listed any more are removed;
    certificates elsewhere are not touched.
  - Where C(update-ca-certificates) is not installed yet, the files are written and taken up when the
    package C(ca-certificates) is installed.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  certificates:
    description: File names (a path is cut to its last part) and the certificates in PEM form.
    type: dict
    required: true
  folder:
    description: The folder of its own.
    type: str
    default: sottovoce
attributes:
  check_mode:
    support: full
    description: Says which certificates would be written or removed.
  diff_mode:
    support: full
    description: Shows the file names before and after.
"""

EXAMPLES = r"""
- name: Trust what the controller trusts
  sottovoce.stack.ca_certificates:
    certificates:
      company.crt: "{{ lookup('ansible.builtin.file', '/usr/local/share/ca-certificates/company.crt') }}"
"""

RETURN = r"""
written:
  description: Names of the files that were (or would be) written.
  returned: success
  type: list
  elements: str
removed:
  description: Names of the files that were (or would be) removed.
  returned: success
  type: list
  elements: str
"""

import os
from collections.abc import Iterable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _ca_certificates as ca

ROOT = "/usr/local/share/ca-certificates"
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "certificates": {"type": "dict", "required": True},
            "folder": {"type": "str", "default": "sottovoce"},
        },
        supports_check_mode=True,
    )
    folder = module.params["folder"]
    if not folder or "/" in folder or folder.startswith("."):
        module.fail_json(msg=f"folder must be the name of a folder below {ROOT}, not {folder!r}")
    path = os.path.join(ROOT, folder)
    try:
        files = ca.wanted_files({str(k): str(v) for k, v in module.params["certificates"].items()})
    except ca.CertificateError as error:
        module.fail_json(msg=str(error))
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(".crt"))
    except OSError:
        names = []
    tool = module.get_bin_path("update-ca-certificates", opt_dirs=["/usr/sbin"])
    there = {name: read(os.path.join(path, name)) for name in names}
    # Without the tool there is no bundle to compare with.
    bundle = read(BUNDLE) if tool else "".join(files.values())
    plan = ca.plan(files, there, bundle)
    if plan.changed and not module.check_mode:
        apply(module, plan, path, tool)
    module.exit_json(
        changed=plan.changed,
        written=sorted(plan.write),
        removed=plan.remove,
        diff={"before": listing(names), "after": listing(files)} if plan.changed else {},
    )


def apply(module: AnsibleModule, plan: ca.Plan, path: str, tool: str | None) -> None:
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
        for name, text in plan.write.items():
            fresh = os.path.join(path, f".{name}.new")
            with open(fresh, "w", encoding="utf-8") as handle:
                handle.write(text)
            os.chmod(fresh, 0o644)
            os.replace(fresh, os.path.join(path, name))
        for name in plan.remove:
            os.unlink(os.path.join(path, name))
    except OSError as error:
        module.fail_json(msg=f"Cannot write the certificates: {error}")
    if tool:
        rc, out, err = module.run_command([tool])
        if rc != 0:
            module.fail_json(msg=f"update-ca-certificates failed: {err.strip() or out.strip()}", rc=rc)


def listing(names: Iterable[str]) -> str:
    return "".join(f"{name}\n" for name in sorted(names))


if __name__ == "__main__":
    main()
