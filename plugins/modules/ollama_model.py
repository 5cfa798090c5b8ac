#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ollama_model
short_description: Models of an Ollama server
version_added: 0.1.0
description:
  - Pulls models from a registry, makes one from a local GGUF file, or removes models.
  - Talks to the server's own API; needs no C(ollama) command.
  - What is there already is recognised by name and digest; only what is missing is fetched.
  - An interrupted pull is resumed by the next one.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  name:
    description:
      - Names of the models, as C(ollama pull) takes them; without a tag C(:latest) is meant.
    type: list
    elements: str
    required: true
  state:
    description: Whether the models should be there.
    type: str
    choices: [present, absent]
    default: present
  gguf:
    description:
      - GGUF file on the target to make the one model in O(name) from, instead of pulling it.
      - A model that was made from a file with other content is made anew.
    type: path
  checksum:
    description:
      - SHA-256 of O(gguf), with or without C(sha256:) before it.
      - The file must have it. When given, a model that is there is recognised without reading the file.
    type: str
  digest:
    description:
      - Digest (or its beginning, as C(ollama list) shows it) that the one model in O(name) must have.
      - A model with another digest is pulled again; if the registry gives another one, the task fails.
    type: str
  url:
    description: Address of the server, seen from the target.
    type: str
    default: http://127.0.0.1:11434
  required:
    description:
      - With V(false) a registry that cannot be reached is no failure; the models are named in RV(left_out).
      - Everything else (no such model, no space left) fails all the same.
    type: bool
    default: true
  registry_timeout:
    description: Seconds the registry may take for its first answer.
    type: float
    default: 5
  stall_timeout:
    description: Seconds that a pull may go on without a byte arriving.
    type: float
    default: 60
  timeout:
    description: Seconds that one model may take.
    type: float
    default: 3600
attributes:
  check_mode:
    support: full
    description: >-
      Can run in check_mode and return changed status prediction without modifying the target. Whether the
      registry can be reached is found out by connecting to it.
  diff_mode:
    support: full
    description: Returns the names and digests of the models before and after.
  platform:
    support: full
    platforms: linux
    description: Target OS this module runs on.
notes:
  - Every 15 seconds the progress of a pull goes to the target's system log.
  - In check mode a server that is not running yet counts as one without models.
"""

EXAMPLES = r"""
- name: A chat model and one for embeddings
  sottovoce.stack.ollama_model:
    name:
      - llama3.2:3b
      - nomic-embed-text

- name: A model from a file on the target
  sottovoce.stack.ollama_model:
    name: house
    gguf: /srv/models/house-q4_k_m.gguf

- name: Exactly this one
  sottovoce.stack.ollama_model:
    name: all-minilm
    digest: 1b226e2802db

- name: A model that nobody uses any more
  sottovoce.stack.ollama_model:
    name: llama2
    state: absent
"""

RETURN = r"""
models:
  description: What was done with each model.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name with its tag.
      type: str
      returned: success
    action:
      description: One of C(present), C(pulled), C(created), C(removed), C(absent), C(skipped).
      type: str
      returned: success
    digest:
      description: Digest of the model.
      type: str
      returned: when it is known
    gguf_sha256:
      description: SHA-256 of the GGUF file.
      type: str
      returned: when O(gguf) is given
    bytes:
      description: Size of what was pulled or created.
      type: int
      returned: when something was fetched
    seconds:
      description: How long that took.
      type: float
      returned: when something was fetched
left_out:
  description: Models that were left out because their registry cannot be reached.
  returned: success
  type: list
  elements: dict
  contains:
    what:
      description: The model.
      type: str
      returned: success
    why:
      description: The reason.
      type: str
      returned: success
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils._ollama import (
    Limits,
    ModelTask,
    OllamaError,
    OllamaServer,
    Progress,
    manage,
)

LOG_EVERY = 15.0


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "gguf": {"type": "path"},
            "checksum": {"type": "str"},
            "digest": {"type": "str"},
            "url": {"type": "str", "default": "http://127.0.0.1:11434"},
            "required": {"type": "bool", "default": True},
            "registry_timeout": {"type": "float", "default": 5},
            "stall_timeout": {"type": "float", "default": 60},
            "timeout": {"type": "float", "default": 3600},
        },
        mutually_exclusive=[["gguf", "digest"]],
        required_by={"checksum": ["gguf"]},
        supports_check_mode=True,
    )
    params = module.params
    if len(params["name"]) != 1 and (params["gguf"] or params["digest"]):
        module.fail_json(msg="gguf and digest speak of one model: give exactly one name")
    logged = time.monotonic()

    def on_progress(name: str, progress: Progress) -> None:
        nonlocal logged
        if time.monotonic() - logged >= LOG_EVERY:
            logged = time.monotonic()
            module.log(f"{name}: {progress.status}, {progress.completed} of {progress.total} bytes")

    task = ModelTask(
        names=tuple(params["name"]),
        present=params["state"] == "present",
        gguf=params["gguf"],
        checksum=params["checksum"],
        digest=params["digest"],
        required=params["required"],
        check=module.check_mode,
    )
    limits = Limits(
        registry=params["registry_timeout"], stall=params["stall_timeout"], total=params["timeout"]
    )
    try:
        outcome = manage(OllamaServer(params["url"], limits), task, on_progress)
    except (OllamaError, ValueError) as error:
        module.fail_json(msg=str(error))
    diff = {
        "before": "".join(f"{name} {value}\n" for name, value in sorted(outcome.before.items())),
        "after": "".join(f"{name} {value}\n" for name, value in sorted(outcome.after.items())),
        "before_header": "models of the server",
        "after_header": "models of the server",
    }
    module.exit_json(changed=outcome.changed, models=outcome.models, left_out=outcome.left_out, diff=diff)


if __name__ == "__main__":
    main()
