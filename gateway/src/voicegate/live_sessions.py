"""All live sessions of the server: how many there may be, and the ears they share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from voicegate import errors
from voicegate.ears import Ears
from voicegate.ears_wire import Turn
from voicegate.engine import Engine
from voicegate.live import Asked, Happened, Live
from voicegate.settings import Settings


class LiveSessions:
    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings = settings
        self._engine = engine
        self._ears = Ears(settings)
        self.count = 0

    def check_room(self) -> None:
        """ApiError (429) if there are too many."""
        if self.count >= self._settings.live_limit:
            raise errors.live_limit(self._settings.live_limit)

    @asynccontextmanager
    async def open(
        self,
        client: str,
        asked: Asked,
        form: str,
        rate: int,
        turn: Turn | None,
        tell: Callable[[Happened], None],
    ) -> AsyncIterator[Live]:
        """A session, until the block ends. ApiError (429) if there are too many."""
        self.check_room()
        self.count += 1
        try:
            live = Live(self._engine, self._ears, client, asked, tell)
            await live.start(form, rate, turn)
            try:
                yield live
            finally:
                await live.close()
        finally:
            self.count -= 1

    async def stop(self) -> None:
        await self._ears.stop()
