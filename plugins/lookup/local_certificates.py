# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
name: local_certificates
short_description: The certificate authorities that the controller trusts beside the usual ones
version_added: 0.1.0
description:
  - Reads the certificates (C(*.crt)) below folders of the controller, for example
    C(/usr/local/share/ca-certificates), where administrators put those of their company.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  _terms:
    description: Folders. One that does not exist, or an empty name, gives nothing.
    type: list
    elements: path
    required: true
"""

EXAMPLES = r"""
- name: Trust what the controller trusts
  sottovoce.stack.ca_certificates:
    certificates: "{{ lookup('sottovoce.stack.local_certificates', '/usr/local/share/ca-certificates') }}"
"""

RETURN = r"""
_raw:
  description: Relative paths and contents of the files.
  type: list
  elements: dict
"""

import os
from typing import Any

from ansible.plugins.lookup import LookupBase
from ansible.utils.display import Display

display = Display()


class LookupModule(LookupBase):  # type: ignore[misc]
    def run(self, terms: list[str], variables: Any = None, **kwargs: Any) -> list[dict[str, str]]:
        self.set_options(var_options=variables, direct=kwargs)
        return [read_folder(os.path.expanduser(str(term))) for term in terms]


def read_folder(folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if not folder:
        return found
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if not name.endswith(".crt"):
                continue
            full = os.path.join(path, name)
            try:
                with open(full, encoding="utf-8") as handle:
                    found[os.path.relpath(full, folder)] = handle.read()
            except (OSError, ValueError) as error:
                display.warning(f"The certificate {full} is not handed on: {error}")
    return found
