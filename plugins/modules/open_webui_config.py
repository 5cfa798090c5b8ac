#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: open_webui_config
short_description: Settings of a running Open WebUI
version_added: 0.1.0
description:
  - Compares settings in Open WebUI's database with those given and changes the ones that differ, through
    its own API. They take effect at once, without a restart.
  - Open WebUI reads most environment variables at its first start only, so this is how an address, a key
    or a model changes later.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  url:
    description: Base URL of Open WebUI.
    type: str
    default: http://127.0.0.1:3000
  credentials_file:
    description: JSON file on the target with C(email) and C(password) of an administrator.
    type: path
    default: /etc/sottovoce/open-webui-admin.json
  token_file:
    description:
      - Where the session of the last run is kept, readable for root only.
      - Open WebUI allows an account few sign-ins a minute, and each one costs time.
      - Empty signs in each time.
    type: path
    default: /etc/sottovoce/open-webui-admin.token
  ollama:
    description: Connection to Ollama; left out, it stays as it is.
    type: dict
    suboptions:
      url:
        description:
          - URL without a path; empty turns Ollama off.
          - It becomes the first connection; others that were added on the web page stay.
        type: str
        default: ""
  stt:
    description: Speech-to-text; left out, it stays as it is.
    type: dict
    suboptions:
      url:
        description: Base URL of an OpenAI-compatible server, with C(/v1); empty turns it off.
        type: str
        default: ""
      api_key:
        description: Its key.
        type: str
        default: ""
      model:
        description: Model named in each request.
        type: str
        default: whisper-1
  tts:
    description: Text-to-speech; left out, it stays as it is.
    type: dict
    suboptions:
      url:
        description: Base URL of an OpenAI-compatible server, with C(/v1); empty means the browser speaks.
        type: str
        default: ""
      api_key:
        description: Its key.
        type: str
        default: ""
      model:
        description: Model named in each request.
        type: str
        default: tts-1
      voice:
        description: Voice named in each request.
        type: str
        default: alloy
  settings:
    description: Further settings by their dotted name, as C(GET /api/v1/configs/export) lists them.
    type: dict
    default: {}
  timeout:
    description: Seconds for each request.
    type: float
    default: 20
attributes:
  check_mode:
    support: full
    description: Reads the settings and says which would change.
  diff_mode:
    support: full
    description: Shows the settings that change; keys and passwords only as changed.
notes:
  - In check mode before the first start there is nothing to ask; then everything counts as to be changed.
"""

EXAMPLES = r"""
- name: Let Open WebUI hear through another server
  sottovoce.stack.open_webui_config:
    stt:
      url: http://10.120.0.1:8000/v1
      api_key: "{{ stt_server_api_key }}"
      model: large-v3-turbo

- name: Close the sign-up page
  sottovoce.stack.open_webui_config:
    settings:
      ui.enable_signup: false
"""

RETURN = r"""
settings_changed:
  description: Names of the settings that were changed.
  returned: success
  type: list
  elements: str
  sample: [audio.stt.openai.api_base_url]
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _open_webui as webui


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "default": "http://127.0.0.1:3000"},
            "credentials_file": {"type": "path", "default": "/etc/sottovoce/open-webui-admin.json"},
            "token_file": {
                "type": "path",
                "default": "/etc/sottovoce/open-webui-admin.token",
                "no_log": False,
            },
            "ollama": {"type": "dict", "options": {"url": {"type": "str", "default": ""}}},
            "stt": {
                "type": "dict",
                "options": {
                    "url": {"type": "str", "default": ""},
                    "api_key": {"type": "str", "default": "", "no_log": True},
                    "model": {"type": "str", "default": "whisper-1"},
                },
            },
            "tts": {
                "type": "dict",
                "options": {
                    "url": {"type": "str", "default": ""},
                    "api_key": {"type": "str", "default": "", "no_log": True},
                    "model": {"type": "str", "default": "tts-1"},
                    "voice": {"type": "str", "default": "alloy"},
                },
            },
            "settings": {"type": "dict", "default": {}},
            "timeout": {"type": "float", "default": 20},
        },
        supports_check_mode=True,
    )
    params = module.params
    token_file = params["token_file"]
    # Secrets among the free settings must not come back in the result.
    module.no_log_values.update(
        value
        for name, value in params["settings"].items()
        if value and isinstance(value, str) and webui.is_secret(name)
    )
    if not params["url"].startswith(("http://", "https://")):
        module.fail_json(msg=f"url must begin with http:// or https://, not {params['url']!r}")

    wanted: dict[str, Any] = {}
    if params["stt"] is not None:
        wanted.update(webui.stt_settings(webui.Speech(**params["stt"])))
    if params["tts"] is not None:
        wanted.update(webui.tts_settings(webui.Speech(**params["tts"])))

    def ollama(current: dict[str, Any]) -> dict[str, Any]:
        return {} if params["ollama"] is None else webui.ollama_settings(params["ollama"]["url"], current)

    try:
        if module.check_mode and not os.path.exists(params["credentials_file"]):
            raise webui.OpenWebuiUnreachable("not installed yet")
        account = webui.Credentials.load(params["credentials_file"])
        module.no_log_values.add(account.password)
        kept = (webui.read_text(token_file) or "").strip() if token_file else ""
        service = webui.OpenWebui(
            webui.http_transport(params["url"], params["timeout"]),
            account.email,
            account.password,
            kept or None,
        )
        current = service.settings()
        wanted = {**wanted, **ollama(current), **params["settings"]}
        update = webui.changes(current, wanted)
        if update and not module.check_mode:
            service.change(update)
        if token_file and service.token and service.token != kept and not module.check_mode:
            webui.write_private(token_file, service.token + "\n")
    except webui.OpenWebuiUnreachable as error:
        if not module.check_mode:
            module.fail_json(msg=str(error))
        current, update = {}, {**wanted, **ollama({}), **params["settings"]}
    except (webui.OpenWebuiError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=bool(update), settings_changed=sorted(update), diff=webui.settings_diff(current, update)
    )


if __name__ == "__main__":
    main()
