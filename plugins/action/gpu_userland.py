# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller's half of gpu_userland: where it is the host of the container, it sends its own libraries."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_userland as userland

MODULE = "sottovoce.stack.gpu_userland"


def loader_cache() -> str:
    """Return what `ldconfig -p` prints; nothing where there is no ldconfig."""
    program = shutil.which("ldconfig", path="/usr/sbin:/sbin:/usr/bin")
    if not program:
        return ""
    told = subprocess.run([program, "-p"], capture_output=True, text=True, timeout=20, check=False)
    return told.stdout


class ActionModule(ActionBase):  # type: ignore[misc]
    """Asks the module first; only a container without matching libraries gets any."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)

        def module(**more: Any) -> dict[str, Any]:
            answer = self._execute_module(
                module_name=MODULE, module_args={**args, **more}, task_vars=task_vars
            )
            return {**result, **answer}

        answer = module()
        if not answer.pop("wants_files", False):
            return answer
        try:
            files = userland.controller_files(
                answer["driver"],
                answer["machine"],
                answer["boot_id"],
                str(args.get("library_path") or ""),
                loader_cache(),
                shutil.which("nvidia-smi") or "",
            )
            digests = {name: userland.sha256(path) for name, path in files.items()}
        except userland.UserlandError as error:
            return {**answer, "why_not_copied": str(error)}
        except OSError as error:
            raise AnsibleActionFail(f"gpu_userland: {error}") from error
        if self._task.check_mode:
            return module(files=digests)
        remote = self._make_tmp_path()
        try:
            for name, path in files.items():
                self._transfer_file(str(path), self._connection._shell.join_path(remote, name))
            return module(files=digests, src=remote)
        finally:
            self._remove_tmp_path(remote, force=True)
