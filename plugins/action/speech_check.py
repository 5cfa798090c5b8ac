# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hands a recording of the controller to the module speech_check."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):  # type: ignore[misc]
    """The recording travels with the module: no file is left on the target, and no task is spent on it."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        try:
            audio = Path(self._find_needle("files", str(args.get("audio", "")))).read_bytes()
        except OSError as error:
            raise AnsibleActionFail(f"audio: {error}") from error
        args["content"] = base64.b64encode(audio).decode()
        answer = self._execute_module("sottovoce.stack.speech_check", module_args=args, task_vars=task_vars)
        return {**result, **answer}
