"""When an engine has been without work for a while."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any


class Idle:
    """Counts who is at work; `expire` runs once nobody has been for `seconds` (negative: never)."""

    def __init__(self, seconds: int, expire: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.active = 0
        self._seconds = seconds
        self._expire = expire
        self._timer: asyncio.TimerHandle | None = None
        self._expiring: asyncio.Task[None] | None = None
        self._stopped = False

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self._cancel()
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self.rest()

    def rest(self) -> None:
        """Start counting, once nothing is left to do."""
        self._cancel()
        if self._seconds >= 0 and not self.active and not self._stopped:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._spawn)

    def stop(self) -> None:
        self._stopped = True
        self._cancel()
        if self._expiring is not None:
            self._expiring.cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _spawn(self) -> None:
        self._expiring = asyncio.create_task(self._expire())
