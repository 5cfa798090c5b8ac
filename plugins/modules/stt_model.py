#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: stt_model
short_description: Models of a Speaches server
version_added: 0.1.0
description:
  - Has a Speaches server download a model, load it or remove it, through its API.
  - Speaches downloads nothing on the first request, and lists a model as loaded whose loading failed. This
    module downloads when the model is missing, and with O(state=loaded) ends only after it was really loaded.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  name:
    description: Id of the model on the hub, such as V(Systran/faster-whisper-small).
    type: str
    required: true
    aliases: [model]
  url:
    description: Address of the server; a trailing C(/v1) is accepted.
    type: str
    default: http://127.0.0.1:8000
  api_key:
    description: Key of the server, if it asks for one.
    type: str
  state:
    description:
      - V(present) means on the disk, V(loaded) also in memory, V(absent) neither.
    type: str
    choices: [present, loaded, absent]
    default: loaded
  timeout:
    description: Seconds that an ordinary request may take.
    type: float
    default: 30
  download_timeout:
    description: Seconds that a download, or loading, may take.
    type: float
    default: 3600
  start_timeout:
    description: Seconds to wait for the server to come up.
    type: float
    default: 60
attributes:
  check_mode:
    support: full
    description: Can run in check_mode and return changed status prediction without modifying target.
  diff_mode:
    support: full
    description: Shows whether the model is present and loaded, before and after.
  platform:
    support: full
    platforms: posix
    description: Target OS this module runs on.
"""

EXAMPLES = r"""
- name: Have a model ready before the first request
  sottovoce.stack.stt_model:
    name: Systran/faster-whisper-small
    url: http://127.0.0.1:8000

- name: Free the disk of another one
  sottovoce.stack.stt_model:
    name: Systran/faster-whisper-large-v3
    state: absent
"""

RETURN = r"""
model:
  description: Id of the model.
  returned: success
  type: str
present:
  description: Whether the model is on the disk now.
  returned: success
  type: bool
loaded:
  description: Whether the model is in memory now.
  returned: success
  type: bool
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt_speaches


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True, "aliases": ["model"]},
            "url": {"type": "str", "default": "http://127.0.0.1:8000"},
            "api_key": {"type": "str", "no_log": True},
            "state": {"type": "str", "choices": ["present", "loaded", "absent"], "default": "loaded"},
            "timeout": {"type": "float", "default": 30},
            "download_timeout": {"type": "float", "default": 3600},
            "start_timeout": {"type": "float", "default": 60},
        },
        supports_check_mode=True,
    )
    params = module.params
    server = _stt_speaches.Speaches(
        params["url"],
        params["api_key"] or "",
        timeout=params["timeout"],
        download_timeout=params["download_timeout"],
    )
    try:
        _stt_speaches.wait_until_up(server, params["start_timeout"])
        before = _stt_speaches.observe(server, params["name"])
        after = _stt_speaches.wanted(params["state"], before)
        if not module.check_mode:
            _stt_speaches.converge(server, params["name"], params["state"], before)
    except _stt_speaches.ApiError as error:
        module.fail_json(msg=f"{params['name']}: {error}")
    module.exit_json(
        changed=before != after,
        model=params["name"],
        present=after.present,
        loaded=after.loaded,
        diff={
            "before_header": params["name"],
            "after_header": params["name"],
            "before": before.text(),
            "after": after.text(),
        },
    )


if __name__ == "__main__":
    main()
