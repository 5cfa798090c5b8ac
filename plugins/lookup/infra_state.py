# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: infra_state
short_description: The desired state of Incus that an infra.yml declares
version_added: 0.1.0
author:
  - The sottovoce.stack contributors (@sottovoce)
description:
  - Returns what M(sottovoce.stack.incus_infra) applies for an C(infra.yml).
  - The variable C(sottovoce_state) that P(sottovoce.stack.infra#inventory) sets is this lookup.
  - In a run that has this file as its inventory the answer is what the inventory was made of.
options:
  _terms:
    description: The file, or the folder that holds C(infra.yml) or C(base.yml).
    type: list
    elements: path
    required: true
"""

EXAMPLES = r"""
- name: Apply what another file declares
  sottovoce.stack.incus_infra:
    desired: "{{ lookup('sottovoce.stack.infra_state', '/srv/lab/infra.yml') }}"
"""

RETURN = r"""
_raw:
  description: One desired state per file.
  type: list
  elements: dict
"""

import os
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_model import load, remembered
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import InfraError


class LookupModule(LookupBase):  # type: ignore[misc]
    def read(self, path: str) -> bytes:
        with open(self._loader.get_real_file(path, decrypt=True), "rb") as stream:
            return stream.read()

    def run(self, terms: list[str], variables: Any = None, **kwargs: Any) -> list[Any]:
        self.set_options(var_options=variables, direct=kwargs)
        found = []
        for term in terms:
            path = os.path.abspath(os.path.expanduser(str(term)))
            model = remembered(path)
            if model is None:
                try:
                    model = load(path, read=self.read)
                except InfraError as error:
                    raise AnsibleError(str(error)) from None
            found.append(model.state)
        return found
