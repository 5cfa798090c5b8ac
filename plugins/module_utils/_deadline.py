# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Questions to the network with one deadline over all of it: name lookups have none of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class NoAnswer(Exception):
    """Nothing came within the time; str() says how long that was."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """
    What `call` returns, or the exception that it raises; NoAnswer if neither came in `seconds`. Its thread is
    then left to itself and ends with the process at the latest.
    """
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            answers.put((True, call()))
        except Exception as error:  # handed on to who asked
            answers.put((False, error))

    threading.Thread(target=attempt, daemon=True).start()
    try:
        returned, answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise NoAnswer(f"no answer within {seconds:g} s") from None
    if not returned:
        raise answer
    result: T = answer
    return result
