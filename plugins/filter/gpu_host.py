# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters around gpu_preflight: who wants a card, and what was found, for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_preflight


class FilterModule:
    """Filters of sottovoce.stack for the host's GPU."""

    def filters(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "gpu_machines": _gpu_preflight.machines,
            "gpu_refusal": _gpu_preflight.refusal,
            "gpu_report": _gpu_preflight.report,
        }
