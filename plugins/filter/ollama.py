# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters for the role ollama_server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _ollama


class FilterModule:
    """Filters of sottovoce.stack for Ollama."""

    def filters(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "ollama_problems": _ollama.problems,
            "ollama_plan": _ollama.plan,
            "ollama_summary": _ollama.summary,
        }
