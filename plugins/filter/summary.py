# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters that turn what plays found into text that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _summary, _vram_text


class FilterModule:
    """Filters of sottovoce.stack for summaries and tables."""

    def filters(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "pick_vars": _summary.pick_vars,
            "summary_vars": _summary.summary_vars,
            "running_instances": _summary.running_instances,
            "unhealthy_services": _summary.unhealthy_services,
            "instances_to_create": _summary.instances_to_create,
            "infra_summary": _summary.infra_summary,
            "apply_summary": _summary.apply_summary,
            "status_table": _summary.status_table,
            "has_card": _summary.has_card,
            "vram_report": _vram_text.vram_report,
            "vram_problems": _vram_text.vram_problems,
        }
