# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters about the GPU of a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_capability, _gpu_userland


class FilterModule:
    """Filters of sottovoce.stack for GPUs."""

    def filters(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "gpu_cards": _gpu_capability.cards_of,
            "gpu_userland_summary": _gpu_userland.summarize,
        }
