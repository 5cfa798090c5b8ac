#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: open_webui_credentials
short_description: Secret key and first administrator of Open WebUI, made once on the machine
version_added: 0.1.0
description:
  - Makes a secret key and a password on the machine they are for, once; neither ever leaves it.
  - Writes a JSON file with C(email) and C(password) for people and for other modules, and an environment
    file with C(WEBUI_ADMIN_EMAIL), C(WEBUI_ADMIN_PASSWORD) and C(WEBUI_SECRET_KEY) for systemd.
  - Both belong to root and are readable for nobody else.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  path:
    description: JSON file with the account.
    type: path
    default: /etc/sottovoce/open-webui-admin.json
  environment_file:
    description: Environment file for the unit.
    type: path
    default: /etc/sottovoce/open-webui-secrets.env
  email:
    description: Sign-in name, used when the file is made.
    type: str
    default: admin@localhost
  password:
    description: Password; left out, the one in the file, or a new one.
    type: str
attributes:
  check_mode:
    support: full
    description: Says whether the files would be written.
  diff_mode:
    support: full
    description: Names what would be written, without any secret.
"""

EXAMPLES = r"""
- name: Make the secrets of Open WebUI once
  sottovoce.stack.open_webui_credentials:
    email: admin@localhost
"""

RETURN = r"""
key_made:
  description: Whether the secret key is new, so that a running Open WebUI has to be restarted.
  returned: success
  type: bool
path:
  description: JSON file with the account.
  returned: success
  type: str
  sample: /etc/sottovoce/open-webui-admin.json
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _open_webui as webui


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/etc/sottovoce/open-webui-admin.json"},
            "environment_file": {"type": "path", "default": "/etc/sottovoce/open-webui-secrets.env"},
            "email": {"type": "str", "default": "admin@localhost"},
            "password": {"type": "str", "no_log": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    path, environment_file = params["path"], params["environment_file"]
    before, after = [], []
    try:
        current = {name: webui.read_text(name) for name in (path, environment_file)}
        made = webui.make_secrets(
            email=params["email"],
            password=params["password"],
            credentials=current[path],
            environment=current[environment_file],
        )
        for name, text in ((path, made.credentials), (environment_file, made.environment)):
            if current[name] == text and webui.is_private(name):
                continue
            before.append(f"{name}: {'absent' if current[name] is None else 'other content or mode'}")
            after.append(f"{name}: present, readable for root only")
            if not module.check_mode:
                webui.write_private(name, text)
    except (OSError, webui.OpenWebuiError) as error:
        module.fail_json(msg=f"The secrets of Open WebUI could not be kept: {error}")
    module.exit_json(
        changed=bool(after),
        key_made=made.key_made,
        path=path,
        diff={"before": "".join(f"{x}\n" for x in before), "after": "".join(f"{x}\n" for x in after)},
    )


if __name__ == "__main__":
    main()
