"""A Speaches in front of which voicegate stands, as a tenant of the card.

It loads a model when a request needs it, without a look at the card, and lets it go only when told. All of
its transcriptions come from here, so both can be decided here (`peace`). Its process keeps a CUDA context
when its model has gone (`--vram-kept-mib`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any

import httpx2

from voicegate import errors
from voicegate.errors import ApiError
from voicegate.idle import Idle
from voicegate.logs import event
from voicegate.peace import Peace
from voicegate.settings import Settings

ASK_TIMEOUT = 5.0  # seconds
LOAD_TIMEOUT = 300.0


class Unreachable(Exception):
    """Nothing was sent that could have been done: it may be sent again."""


class SpeachesError(Exception):
    """An answer that is of no use; `status` is HTTP's, 0 without one."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Speaches:
    """Its memory: which models are in it, to load one, to let one go."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client

    async def loaded(self) -> list[str]:
        """Also those that load now, and those whose loading failed."""
        answer = await self._ask("GET", "/api/ps")
        names = answer.get("models")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SpeachesError("/api/ps: the answer is not that of Speaches")
        return names

    async def hearing(self) -> set[str]:
        """The models on its disk that transcribe."""
        answer = await self._ask("GET", "/v1/models?task=automatic-speech-recognition")
        try:
            return {str(item["id"]) for item in answer["data"]}
        except (KeyError, TypeError) as error:
            raise SpeachesError(f"/v1/models: {type(error).__name__}: {error}") from error

    async def resolve(self, name: str) -> str:
        """The id that a name of its model_aliases.json stands for; the name itself where there is none."""
        try:
            answer = await self._ask("GET", f"/v1/models/{_path(name)}")
        except SpeachesError as error:
            if error.status != 404:
                raise
            return name
        return str(answer.get("id") or name)

    async def load(self, name: str) -> None:
        """Returns when it is loaded."""
        try:
            await self._ask("POST", f"/api/ps/{_path(name)}", LOAD_TIMEOUT)
        except SpeachesError as error:
            if error.status != 409:  # that it is already
                raise

    async def unload(self, name: str) -> bool:
        """Let it go; False if it was not there, or is in use and goes when its last request has ended."""
        try:
            await self._ask("DELETE", f"/api/ps/{_path(name)}")
        except SpeachesError as error:
            if error.status not in (404, 409):
                raise
            return False
        return True

    async def _ask(self, method: str, path: str, timeout: float = ASK_TIMEOUT) -> dict[str, Any]:
        try:
            response = await self._client.request(method, path, timeout=timeout)
        except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
            raise SpeachesError(f"{method} {path}: no answer within {timeout:g} s") from error
        except httpx2.HTTPError as error:
            raise Unreachable(f"{method} {path}: {type(error).__name__}: {error}") from error
        if response.status_code >= 300:
            raise SpeachesError(f"{method} {path}: status {response.status_code}", response.status_code)
        try:
            answer = response.json()
        except ValueError as error:
            raise SpeachesError(f"{method} {path}: the answer is no JSON") from error
        if not isinstance(answer, dict):
            raise SpeachesError(f"{method} {path}: the answer is no object")
        return answer


def _path(name: str) -> str:
    return urllib.parse.quote(name, safe="/")


class SpeachesTenant:
    """What `peace` asks of an engine, and `have` before a request."""

    def __init__(self, settings: Settings, peace: Peace, client: httpx2.AsyncClient, model: str) -> None:
        self._settings = settings
        self._peace = peace
        self._speaches = Speaches(client)
        self._model = model
        self._idle = Idle(settings.ttl, self.unload)
        # Nothing is let go between the look whether it is loaded and the request that needs it.
        self._lock = asyncio.Lock()
        self._context = False  # its process has one on the card
        self._loading: set[asyncio.Task[None]] = set()
        self._inside = 0  # requests that it works on
        self._suspect: set[str] = set()  # models that a request failed with
        self._told = ""
        self.away = False  # its model is not on the card

    def at_work(self) -> AbstractContextManager[None]:
        return self._idle.at_work()

    def note_gone(self) -> None:
        """Its process does not answer: what it had on the card went with it."""
        self._context = False

    def watch(self) -> None:
        self._peace.watch(self)

    async def arrive(self) -> None:
        """It is there, for the first time or again."""
        await self.on_card()
        if self._settings.ttl < 0:
            await self.start()
        self._idle.rest()

    async def stop(self) -> None:
        self._idle.stop()
        for task in self._loading:
            task.cancel()
        await self._peace.stop()

    # -- for peace

    def idle(self) -> bool:
        return not self._idle.active

    async def on_card(self) -> bool:
        try:
            found = bool(await self._there())
        except (SpeachesError, Unreachable) as error:
            self._tell(error)
            return False
        self.away = not found
        self._context = self._context or found
        return found

    async def unload(self) -> None:
        """Let go of all that transcribes, unless somebody is at work; the next request loads it again."""
        async with self._lock:
            if not self.idle():
                return
            try:
                for name in await self._there():
                    if await self._speaches.unload(name):
                        event("model_unloaded", model=name)
                    else:
                        event("model_in_use", level=logging.WARNING, model=name)
                self.away = True
            except (SpeachesError, Unreachable) as error:
                self._tell(error)

    async def start(self) -> None:
        try:
            async with self.using(self._model):
                pass
        except ApiError as error:
            # No room on the card now. Whoever asks first tries again.
            event("not_loaded_yet", level=logging.WARNING, code=error.code)
        except Unreachable as error:
            self._tell(error)

    # -- for requests

    @contextlib.asynccontextmanager
    async def using(self, model: str) -> AsyncIterator[None]:
        """For a request to a model: loaded where there is room for it, and there until the request ends.

        ApiError: 503 `vram_busy`, `model_load_failed`. Unreachable.
        """
        with self.at_work():
            # A task of its own: whoever asked for the model may leave, and it is for all.
            loading = asyncio.create_task(self._have(model))
            self._loading.add(loading)
            loading.add_done_callback(self._loading.discard)
            await asyncio.shield(loading)
            self._inside += 1
            try:
                yield
            except ApiError as error:
                # A model that could not be loaded is listed as loaded all the same.
                if error.code in ("engine_failed", "out_of_memory"):
                    self._suspect.add(model)
                raise
            finally:
                self._inside -= 1

    async def _have(self, model: str) -> None:
        with self.at_work():
            async with self._lock:
                try:
                    await self._have_locked(model)
                except SpeachesError as error:
                    self._tell(error)  # no reason to keep the request from it: its own answer will say more

    async def _have_locked(self, asked: str) -> None:
        name = asked
        if asked != self._model:
            name = await self._speaches.resolve(asked)
            if name not in await self._speaches.hearing():
                return  # nobody goes for what it does not have, or cannot hear with
        loaded = name in await self._speaches.loaded()
        if loaded and asked in self._suspect and not self._inside:
            await self._speaches.unload(name)
            loaded = False
        self._suspect.discard(asked)
        if not loaded:
            await self._load(name)
        self.away, self._context = False, True

    async def _load(self, name: str) -> None:
        kept = self._settings.vram_kept_mib if self._context else 0
        # Somebody may have come onto the card after the look, or it was restarted unseen and needs all of it.
        for there in (kept, 0):
            await self._peace.before_load(there)
            started = time.monotonic()
            try:
                await self._speaches.load(name)
            except SpeachesError as error:
                if error.status < 500:
                    raise
                event("model_load_failed", level=logging.ERROR, model=name, error=str(error))
                await self._speaches.unload(name)  # it is listed as loaded all the same
            else:
                event("model_loaded", model=name, seconds=round(time.monotonic() - started, 1))
                return
        self._context = False
        raise errors.load_failed()

    async def _there(self) -> list[str]:
        loaded = await self._speaches.loaded()
        hearing = await self._speaches.hearing() if loaded else set()
        return [name for name in loaded if name in hearing]

    def _tell(self, error: Exception) -> None:
        """Once, not at every request: a server without this API is asked again and again."""
        if str(error) != self._told:
            self._told = str(error)
            event("speaches_failed", level=logging.WARNING, error=self._told)
