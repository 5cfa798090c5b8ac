# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller's half of stt_source: read and pack the source, send it only when the machine lacks it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt_tree

MODULE = "sottovoce.stack.stt_source"
# Never there on the machine, so that the module answers whether it wants the archive.
NOT_SENT = "/nonexistent/stt-source"


class ActionModule(ActionBase):  # type: ignore[misc]
    """Sends one archive, and only when the digest on the machine is another one."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        given = args.get("src")
        if not given:
            return self._merged(result, args, task_vars)
        source = Path(os.path.expanduser(str(given)))
        include = [str(name) for name in args.get("include") or []]
        try:
            args["digest"] = args.get("digest") or _stt_tree.source_digest(source, include)
            answer = self._merged(result, {**args, "src": NOT_SENT}, task_vars)
            if not answer.get("wants_archive"):
                return answer
            with tempfile.TemporaryDirectory() as scratch:
                archive = _stt_tree.normal_archive(source, include, Path(scratch))
                remote = self._make_tmp_path()
                try:
                    sent = self._transfer_file(
                        str(archive), self._connection._shell.join_path(remote, "source.tar")
                    )
                    return self._merged({}, {**args, "src": sent}, task_vars)
                finally:
                    self._remove_tmp_path(remote, force=True)
        except (_stt_tree.TreeError, OSError) as error:
            raise AnsibleActionFail(f"stt_source: {error}") from error

    def _merged(
        self, result: dict[str, Any], args: dict[str, Any], task_vars: dict[str, Any] | None
    ) -> dict[str, Any]:
        answer = self._execute_module(module_name=MODULE, module_args=args, task_vars=task_vars)
        return {**result, **answer}
