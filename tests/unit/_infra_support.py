# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import textwrap
from pathlib import Path

from ansible_collections.sottovoce.stack.plugins.module_utils._infra_model import Model, load_text
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import InfraError, Problem

DATA = Path(__file__).parent / "data" / "infra"
HEAD = "project_name: p\nglobal: {}\n"


def text_of(body: str, head: str = HEAD) -> str:
    return head + textwrap.dedent(body).lstrip("\n")


def model_of(body: str, head: str = HEAD, roles: tuple[str, ...] = ()) -> Model:
    return load_text(text_of(body, head), roles=roles)


def problems_of(text: str | bytes, roles: tuple[str, ...] = ()) -> list[Problem]:
    try:
        load_text(text, roles=roles)
    except InfraError as error:
        return error.problems
    return []
