#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: stt_preflight
short_description: Decide how a machine gets its speech-to-text server
version_added: 0.1.0
description:
  - Looks at a machine (GPU, what is installed, which sources answer) and decides which engine, model and
    device the role P(sottovoce.stack.stt_server#role) gives it. It changes nothing.
  - A source is asked only when something has to come from it, and for a few seconds at most.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  request:
    description: What is asked for, made by the filter C(sottovoce.stack.stt_request).
    type: dict
    required: true
  patience:
    description: Seconds within which a source must answer.
    type: float
    default: 4
  hub_token:
    description: Token of the model hub, for models that are gated.
    type: str
attributes:
  check_mode:
    support: full
    description: It never changes anything.
  diff_mode:
    support: none
    description: It never changes anything.
  platform:
    support: full
    platforms: linux
    description: Target OS this module runs on.
"""

EXAMPLES = r"""
- name: Decide engine, model and device
  sottovoce.stack.stt_preflight:
    request: "{{ __stt_server_request }}"
  register: decided
"""

RETURN = r"""
plan:
  description: Engine, model, device, compute type, unit, what has to be installed, notes and what is skipped.
  returned: success
  type: dict
"""

import glob
import json
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt, _stt_plan, _stt_tree
from ansible_collections.sottovoce.stack.plugins.module_utils._deadline import within


class Probe:
    """Asks an address once."""

    def __init__(self, patience: float, token: str = "") -> None:
        self.patience = patience
        self.token = token
        self.answers: dict[str, str] = {}

    def _ask(self, url: str) -> str:
        try:
            within(self.patience + 0.5, lambda: open_url(url, method="HEAD", timeout=self.patience))
        except urllib.error.HTTPError as error:
            return "" if error.code < 500 and error.code != 404 else f"HTTP {error.code}"
        except Exception as error:  # whatever it is, the source does not answer
            reason = getattr(error, "reason", error)
            return str(getattr(reason, "strerror", None) or reason)
        return ""

    def __call__(self, url: str) -> str:
        if url not in self.answers:
            self.answers[url] = self._ask(url)
        reason = self.answers[url]
        return f"{url.split('/')[2]}: {reason}" if reason else ""

    def status(self, url: str) -> int:
        """Return the status of one answer of the hub, which is given the token; 0 without an answer."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            # Where it redirects to must not be shown the token.
            answer = within(
                self.patience + 0.5,
                lambda: open_url(
                    url, method="HEAD", headers=headers, timeout=self.patience, follow_redirects="none"
                ),
            )
            return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except Exception:  # whatever it is, the hub does not answer
            return 0


def cached(cache: str, identifier: str, revision: str) -> bool:
    """Is the model in a hub cache, at the revision if there is one."""
    return in_cache(cache, identifier, "model.bin", revision)


def in_cache(cache: str, identifier: str, file: str, revision: str = "") -> bool:
    folder = os.path.join(cache, _stt.hub_folder(identifier), "snapshots", revision or "*")
    return bool(glob.glob(os.path.join(folder, file)))


def stamp_at(path: str) -> str:
    try:
        with open(os.path.join(path, ".installed.json"), encoding="utf-8") as handle:
            return str(json.load(handle)["stamp"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def has_python(python: str) -> bool:
    if os.path.isabs(python):
        return os.access(python, os.X_OK)
    return bool(shutil.which(f"python{python}") or glob.glob(f"/opt/uv/python/cpython-{python}*"))


def running(unit: str) -> bool:
    return os.path.lexists(f"/etc/systemd/system/multi-user.target.wants/{unit}.service") or os.path.isdir(
        f"/sys/fs/cgroup/system.slice/{unit}.service"
    )


def cards() -> list[dict[str, str]]:
    """Return name, capability and driver of the cards that nvidia-smi sees; nothing where it is not there."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    query = ["--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        # An unknown card refuses nothing; gpu_userland says what is wrong with the driver.
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines()]
    return [{"name": row[0], "capability": row[1], "driver": row[2]} for row in rows if len(row) == 3]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "request": {"type": "dict", "required": True},
            "patience": {"type": "float", "default": 4},
            "hub_token": {"type": "str", "no_log": True},
        },
        supports_check_mode=True,
    )
    request = module.params["request"]
    probe = Probe(module.params["patience"], module.params["hub_token"] or "")
    facts = _stt_plan.Facts(
        nodes=[os.path.basename(path) for path in glob.glob("/dev/nvidia*")],
        machine=platform.machine(),
        python=f"{sys.version_info[0]}.{sys.version_info[1]}",
        python_path=sys.executable,
        digest_at=lambda path: _stt_tree.recorded(Path(path)),
        stamp_at=stamp_at,
        model_at=lambda path: os.path.isfile(os.path.join(path, "model.bin")),
        cached=cached,
        unreachable=probe,
        has_python=has_python,
        running=[unit for unit in _stt.UNITS.values() if running(unit)],
        cards=cards,
        in_cache=in_cache,
        hub_status=probe.status,
    )
    try:
        plan = _stt_plan.make_plan(request, facts)
    except _stt.SttError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, plan=plan)


if __name__ == "__main__":
    main()
