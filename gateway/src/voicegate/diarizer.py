"""Who speaks when in a recording: asked of Speaches, or found by pyannote.audio in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2

from voicegate import errors, models, upstream, wire
from voicegate.engine import Info, Rank, Source, Turn
from voicegate.errors import ApiError, ModelUnavailable
from voicegate.logs import event, request_id
from voicegate.process import Ended, Process
from voicegate.settings import Settings
from voicegate.worker import Job, OneStep, Worker, stream

ROUTE = "/v1/audio/diarization"  # of Speaches
INSTALL = "pyannote.audio is not installed here; run: pip install 'pyannote-audio>=4,<5'"


class Diarizer(ABC):
    """One file at a time, in the order that transcriptions have."""

    def __init__(self, limit: int) -> None:
        self._worker = Worker(limit)

    async def stop(self) -> None:
        await self._worker.close()

    def check_room(self) -> None:
        """ApiError (429) if a request would be refused now."""
        self._worker.check_room()

    async def turns(self, source: Source, rank: Rank, client: str) -> tuple[Turn, ...]:
        """ApiError with a code of its own (`diarization_…`) for each way in which that can fail."""

        def make(job: Job[Turn]) -> OneStep:
            return OneStep(lambda: self._work(job, source))

        started = time.monotonic()
        async with contextlib.aclosing(stream(self._worker, make, rank, client)) as items:
            found = tuple([turn async for turn in items])
        event(
            "diarized", turns=len(found), speakers=len({turn.speaker for turn in found}),
            seconds=time.monotonic() - started,
        )  # fmt: skip
        return found

    async def _work(self, job: Job[Turn], source: Source) -> None:
        for turn in await job.unless_cancelled(self._find(source)) or ():
            job.emit(turn)

    @abstractmethod
    async def _find(self, source: Source) -> Sequence[Turn]:
        """The turns in `source`; alone, and cancelled when nobody wants them any more."""


def check(settings: Settings) -> None:
    """ModelUnavailable if what tells speakers apart could not work. Imports and loads nothing."""
    if settings.diarization == "pyannote":
        check_installed()
        locate(settings.diarization_model)


def make(settings: Settings) -> Diarizer | None:
    """None where nothing tells speakers apart."""
    match settings.diarization:
        case "upstream":
            return SpeachesDiarizer(settings)
        case "pyannote":
            return PyannoteDiarizer(settings)
    return None


async def with_turns(
    diarizer: Diarizer | None,
    info: Info,
    segments: Sequence[Any],
    source: Source,
    rank: Rank = Rank.INTERACTIVE,
    client: str = "",
) -> Info:
    """`info` with the turns of the speakers in `source`.

    To be asked after the transcription, which tells best what is wrong with audio.
    """
    if diarizer is None:
        raise errors.no_diarization()
    turns = await diarizer.turns(source, rank, client) if segments else ()
    return dataclasses.replace(info, turns=turns)


class SpeachesDiarizer(Diarizer):
    """The upstream's endpoint. Its models are the ones it has for that; it is asked for none."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.queue_limit)
        self._timeout = settings.upstream_timeout
        self._url = upstream.address(settings)
        self._client = upstream.client(settings)

    async def stop(self) -> None:
        await super().stop()
        await self._client.aclose()

    async def _find(self, source: Source) -> Sequence[Turn]:
        # A copy: the source may be closed while a piece of it is on the way.
        descriptor = os.dup(source.descriptor())
        try:
            return read_turns(await self._post(descriptor))
        finally:
            os.close(descriptor)

    async def _post(self, descriptor: int) -> bytes:
        body, length, content_type = upstream.multipart([("response_format", "json")], descriptor)
        headers = {"content-type": content_type, "content-length": str(length)}
        if current := request_id.get():
            headers["x-request-id"] = current
        try:
            response = await self._client.post(ROUTE, content=body, headers=headers)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise errors.diarization_unreachable(self._url) from error
        except httpx2.TimeoutException as error:
            raise errors.diarization_timeout(self._timeout) from error
        except httpx2.HTTPError as error:  # it went away in the middle
            raise errors.diarization_down() from error
        if response.status_code != 200:
            raise refused(response.status_code, response.content)
        return response.content


def refused(status: int, body: bytes) -> ApiError:
    """What a failure of Speaches' endpoint means for whoever asked here."""
    message = upstream.message_of(body)
    match status:
        case 400 | 413 | 415 | 422:
            return errors.invalid(
                f"What tells speakers apart refused the recording: {message}", code="diarization_refused"
            )
        case 401 | 403:
            return errors.unavailable(
                "What tells speakers apart refuses this server's key; its operator must mend that.",
                "diarization_key",
            )
        case 404 if "model" in message.casefold():
            return errors.unavailable(
                f"What tells speakers apart has not all of its models: {message}", "diarization_model_missing"
            )
        case 404 | 405:
            return errors.unavailable(
                f"The speech engine has no {ROUTE}, so it cannot tell speakers apart (Speaches can).",
                "diarization_unsupported",
            )
    event("diarization_failed", level=logging.ERROR, status=status, message=message)
    return errors.unavailable(f"Telling speakers apart failed with status {status}.", "diarization_failed")


def read_turns(body: bytes) -> tuple[Turn, ...]:
    """The turns in Speaches' answer, {"duration", "segments": [{"start", "end", "speaker"}]}.

    ApiError (502) if it is none.
    """
    try:
        answer: Any = json.loads(body)
        turns = tuple(
            Turn(float(item["start"]), float(item["end"]), str(item["speaker"]))
            for item in answer["segments"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise errors.diarization_answer(f"{type(error).__name__}: {error}") from error
    for turn in turns:
        if not (math.isfinite(turn.start) and turn.start <= turn.end < math.inf):
            raise errors.diarization_answer(f"a turn from {turn.start:g} to {turn.end:g} s")
    return turns


def locate(model: str) -> Path:
    """The folder with a pipeline of pyannote.audio: the one given, or in the hub's cache.

    ModelUnavailable if there is none.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if not models.is_hub_id(model):
            raise ModelUnavailable(f"{model!r} is neither a folder here nor a hub id (organisation/name)")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ModelUnavailable(
                f"{model} is not in the cache of models; run: voicegate fetch --diarization-model {model}"
            ) from error
    if not (folder / "config.yaml").is_file():
        raise ModelUnavailable(f"{folder} has no config.yaml; it must be a pipeline of pyannote.audio 4")
    return folder.resolve()


def check_installed() -> None:
    """ModelUnavailable if pyannote.audio is not there. It is not imported: that takes seconds and a GB."""
    try:
        found = importlib.util.find_spec("pyannote.audio")
    except ModuleNotFoundError:  # of `pyannote`
        found = None
    if found is None:
        raise ModelUnavailable(INSTALL)


class PyannoteDiarizer(Diarizer):
    """pyannote.audio in a process that is started by the first request; on the CPU."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.queue_limit)
        self._settings = settings
        self._folder = locate(settings.diarization_model)
        self._process: Process | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._ending is not None:
            await self._ending
        await self._end()
        await super().stop()
        await self._end()  # one that was just being started

    async def _find(self, source: Source) -> Sequence[Turn]:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        done = False
        try:
            process = await self._load()
            number = process.ask(source, None, "diarize")
            message = await process.receive(number)
            process.close(number, ended=True)
            done = True
        except Ended as error:
            event("diarizer_ended", level=logging.ERROR)
            raise errors.diarization_down() from error
        finally:
            if not done:  # also when cancelled: nothing else stops it
                await self._end()
        self._rest()
        if message["kind"] == "error":
            raise wire.error_from(message["value"])
        return wire.turns_from(message["value"])

    async def _load(self) -> Process:
        if self._ending is not None:
            await self._ending
        if self._process is not None and self._process.alive:
            return self._process
        await self._end()
        process = self._process = await Process.spawn("voicegate.diarizer_process")
        process.send(wire.pack("load", wire.settings_to(self._settings), folder=str(self._folder)))
        answer = await process.receive()
        if answer["kind"] == "failed":
            event("diarizer_load_failed", level=logging.ERROR, error=answer["value"])
            raise errors.diarization_not_loaded("its model cannot be loaded; the server's log says why")
        event("diarizer_started", pid=process.pid, model=self._settings.diarization_model)
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.end()

    def _rest(self) -> None:
        if self._settings.ttl >= 0:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self._settings.ttl, self._expire)

    def _expire(self) -> None:
        event("diarizer_unloaded")
        self._ending = asyncio.create_task(self._end())
