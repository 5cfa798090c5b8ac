#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: stt_source
short_description: Put a folder of the controller, or an archive from an address, on a machine in one step
version_added: 0.1.0
description:
  - Compares one digest over names and contents, so that a second run transfers nothing.
  - What has to go over is packed on the controller and sent as one file, held to the digest there, and
    appears by one rename.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  dest:
    description: Folder on the machine. Its parent folders are made.
    type: path
    required: true
  src:
    description:
      - Folder or archive (tar, zip) on the controller.
      - Exactly one of O(src) and O(url) is given.
    type: path
  include:
    description: Names at the top of O(src) that go over; all when empty.
    type: list
    elements: str
    default: []
  url:
    description: Address of an archive (tar, zip) that the machine fetches itself.
    type: str
  digest:
    description: Digest of the content. Required with O(url); with O(src) it is read from there.
    type: str
  layout:
    description: With V(hub), O(dest) gets the layout of one model in the cache of huggingface_hub.
    type: str
    choices: [plain, hub]
    default: plain
  keep:
    description: How many folders of this kind stay in the parent of O(dest); V(0) removes none.
    type: int
    default: 0
  timeout:
    description: Seconds that the address may stay silent.
    type: int
    default: 10
attributes:
  check_mode:
    support: full
    description: Can run in check_mode and return changed status prediction without modifying target.
  diff_mode:
    support: full
    description: Shows the digests before and after.
  action:
    support: full
    description: The controller reads and packs O(src).
  platform:
    support: full
    platforms: linux
    description: Target OS this module runs on.
"""

EXAMPLES = r"""
- name: Copy a model
  sottovoce.stack.stt_source:
    src: /srv/models/small
    dest: /opt/voicegate/models/small

- name: Fetch a pinned source
  sottovoce.stack.stt_source:
    url: https://example.com/source.tar.gz
    digest: 861b0a8cc3e63c1e1961dbba7772bc65de47c33bfe732ae8a420ad95e64b777b
    dest: /opt/example/releases/1.0
"""

RETURN = r"""
digest:
  description: Digest of what is at O(dest) now.
  returned: success
  type: str
removed:
  description: Older folders that were removed.
  returned: success
  type: list
  elements: str
"""

import shutil
import tempfile
import urllib.error
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt_tree


def fetch(url: str, target: Path, timeout: int) -> None:
    """Download url to target; TreeError says what is wrong with it."""
    try:
        with open_url(url, timeout=timeout) as response, target.open("wb") as handle:
            shutil.copyfileobj(response, handle)
    except urllib.error.HTTPError as error:
        raise _stt_tree.TreeError(f"{url} answers HTTP {error.code}.") from error
    except OSError as error:
        raise _stt_tree.TreeError(f"{url} cannot be fetched: {getattr(error, 'reason', error)}") from error


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "dest": {"type": "path", "required": True},
            "src": {"type": "path"},
            "include": {"type": "list", "elements": "str", "default": []},
            "url": {"type": "str"},
            "digest": {"type": "str"},
            "layout": {"type": "str", "choices": ["plain", "hub"], "default": "plain"},
            "keep": {"type": "int", "default": 0},
            "timeout": {"type": "int", "default": 10},
        },
        mutually_exclusive=[("src", "url")],
        required_one_of=[("src", "url")],
        # The action plugin fills in the digest of src.
        required_by={"url": ["digest"], "src": ["digest"]},
        supports_check_mode=True,
    )
    params = module.params
    dest = Path(params["dest"])
    wanted = params["digest"]
    before = _stt_tree.recorded(dest)
    result = {
        "changed": before != wanted,
        "digest": wanted,
        "removed": [],
        "diff": {
            "before_header": str(dest),
            "after_header": str(dest),
            "before": f"{before or 'absent'}\n",
            "after": f"{wanted}\n",
        },
    }
    if before == wanted or module.check_mode:
        module.exit_json(**result)
    try:
        if params["url"]:
            with tempfile.TemporaryDirectory(dir=module.tmpdir) as folder:
                archive = Path(folder, "source")
                fetch(params["url"], archive, params["timeout"])
                _stt_tree.install(archive, dest, wanted, as_hub_cache=params["layout"] == "hub")
        elif Path(params["src"]).is_file():
            _stt_tree.install(Path(params["src"]), dest, wanted, as_hub_cache=params["layout"] == "hub")
        else:
            # First call of the action plugin: it sends the archive now.
            module.exit_json(**{**result, "changed": False, "wants_archive": True})
        if params["keep"]:
            result["removed"] = _stt_tree.prune(dest, params["keep"])
    except (_stt_tree.TreeError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
