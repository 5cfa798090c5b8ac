# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role open_webui tells at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _open_webui


class FilterModule:
    """Filters of sottovoce.stack for Open WebUI."""

    def filters(self) -> Mapping[str, Callable[..., Any]]:
        return {"open_webui_summary": _open_webui.summary}
