# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One deadline over a question: what is returned, what is raised, and what never comes."""

from __future__ import annotations

import threading

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils._deadline import NoAnswer, within


def test_an_answer_and_an_exception_reach_the_caller() -> None:
    assert within(5, lambda: "yes") == "yes"
    with pytest.raises(ValueError, match="no"):
        within(5, lambda: int("no"))


def test_silence_ends_at_the_deadline() -> None:
    never = threading.Event()
    with pytest.raises(NoAnswer, match=r"within 0\.05 s"):
        within(0.05, lambda: never.wait(60))
    never.set()
