"""The engine `builtin` as the server sees it: a process that can be ended at any time.

Only the end of a process returns all of its memory, a CUDA context included. So unloading ends it, and
so does running out of memory. A process that ended by itself is started again; requests it was working on
get an error that says so, those it had only prepared are handed to the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

from voicegate import child, errors, wire
from voicegate.engine import Capabilities, Info, LoadState, Options, Rank, Segment, Source, Status
from voicegate.errors import ApiError, ModelUnavailable
from voicegate.idle import Idle
from voicegate.logs import event, request_id
from voicegate.peace import Peace
from voicegate.settings import Settings
from voicegate.worker import Job, OneStep, Worker, stream

PATIENCE = 30.0  # seconds a cancelled transcription has for its current segment
RESTART_PAUSES = (0.0, 1.0, 5.0, 30.0)  # seconds before a process that keeps ending is started again


class Ended(Exception):
    """The process is gone."""


class Process:
    """One run of the engine's process, and the connection to it."""

    def __init__(self, process: asyncio.subprocess.Process, connection: socket.socket) -> None:
        self.pid = process.pid
        self._process = process
        self._connection = connection
        self._numbers = itertools.count()
        self._inboxes: dict[int | None, asyncio.Queue[dict[str, Any]]] = {None: asyncio.Queue()}
        self.alive = True
        self._reading: asyncio.Task[None]
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @classmethod
    async def spawn(cls, module: str = "voicegate.engine_process") -> Process:
        process, ours = await child.spawn(module)
        self = cls(process, ours)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=wire.LINE_LIMIT)
        self._reading = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        """Hand every message to the transcription that it belongs to."""
        with contextlib.suppress(ConnectionError):
            while (line := await self._reader.readline()).endswith(b"\n"):
                message = wire.unpack(line)
                # What was closed in the meantime has no inbox any more.
                if (inbox := self._inboxes.get(message["number"])) is not None:
                    inbox.put_nowait(message)
        self.alive = False
        for inbox in self._inboxes.values():
            inbox.put_nowait({"kind": "ended"})

    async def receive(self, number: int | None = None) -> dict[str, Any]:
        """The next message of a transcription; without a number, the answer to `load`."""
        message = await self._inboxes[number].get()
        if message["kind"] == "ended":
            self._inboxes[number].put_nowait(message)
            raise Ended
        return message

    def send(self, message: bytes) -> None:
        self._writer.write(message)

    def ask(self, source: Source, options: Options | None, kind: str = "transcribe") -> int:
        """Hand a transcription over; the number is for `step`, `receive` and `close`."""
        number = next(self._numbers)
        message = wire.pack(kind, options, number=number, request_id=request_id.get())
        if not self.alive:
            raise Ended
        try:
            sent = socket.send_fds(self._connection, [message], [source.descriptor()])
        except OSError as error:
            raise Ended from error
        if sent < len(message):
            self._writer.write(message[sent:])
        self._inboxes[number] = asyncio.Queue()
        return number

    def step(self, number: int) -> None:
        self.send(wire.pack("step", number=number))

    def close(self, number: int, ended: bool) -> None:
        """Nothing more is wanted of this one; `ended`: there is nothing more."""
        self._inboxes.pop(number, None)
        if self.alive and not ended:
            self.send(wire.pack("cancel", number=number))

    async def wait(self) -> int:
        return await self._process.wait()

    async def end(self) -> None:
        """All of its memory is free when this returns."""
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await self._reading


class ProcessEngine:
    def __init__(self, settings: Settings, folder: Path, live_folder: Path | None = None) -> None:
        """`live_folder`: of a small model for drafts, loaded and unloaded with the other."""
        self._settings = settings
        self._folder = folder
        self._live_folder = live_folder
        self._worker = Worker(settings.queue_limit)
        self._process: Process | None = None
        self._loading: Process | None = None
        self._load_lock = asyncio.Lock()  # several may be prepared at once
        self._state: LoadState = "loading"
        self._error: str | None = None
        self._device = settings.device
        self._compute_type = settings.compute_type
        self._capabilities: Capabilities | None = None
        self._idle = Idle(settings.ttl, self.unload)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failures = 0  # ends in a row without a transcription between them
        self._stopping = False
        self.peace = Peace.of(settings)
        self.name = f"faster-whisper {importlib.metadata.version('faster-whisper')}"

    async def start(self) -> None:
        if self.peace is not None:
            self.peace.watch(self)
        try:
            await self._internal(self._load)
        except ApiError as error:
            # No room on the card now. Whoever asks first tries again.
            event("not_loaded_yet", level=logging.WARNING, code=error.code)
        self._idle.rest()

    def idle(self) -> bool:
        return not self._idle.active and not self._worker.running

    async def on_card(self) -> bool:
        return self._process is not None

    async def stop(self) -> None:
        self._stopping = True
        if self.peace is not None:
            await self.peace.stop()
        self._idle.stop()
        processes, self._process = (self._process, self._loading), None
        for process in processes:
            if process is not None:
                await process.end()
        await self._worker.close()
        for task in self._tasks:
            task.cancel()

    def status(self) -> Status:
        return Status(
            engine=self.name,
            state=self._state,
            device=self._device,
            compute_type=self._compute_type,
            waiting=self._worker.waiting,
            running=self._worker.running,
            queue_limit=self._worker.limit,
            error=self._error,
        )

    def capabilities(self) -> Capabilities | None:
        return self._capabilities

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def check_room(self) -> None:
        self._worker.check_room()

    async def transcribe(
        self, source: Source, options: Options, rank: Rank = Rank.INTERACTIVE, client: str = ""
    ) -> AsyncGenerator[Info | Segment, None]:
        def make(job: Job[Info | Segment]) -> Transcription:
            return Transcription(self, job, source, options)

        with self._idle.at_work():
            async with contextlib.aclosing(stream(self._worker, make, rank, client)) as items:
                async for item in items:
                    yield item

    async def unload(self) -> None:
        """End the process after what runs; the next request starts one."""
        await self._internal(self._unload)

    # -- between two steps, in the worker

    async def _internal(self, work: Callable[[], Awaitable[Any]]) -> None:
        def make(job: Job[None]) -> OneStep:
            return OneStep(work)

        async with contextlib.aclosing(stream(self._worker, make, Rank.SERVER)) as items:
            async for _unused in items:
                pass

    async def _load(self) -> Process:
        # In a task of its own: whoever asked for it may be cancelled, the process is for all.
        task = asyncio.create_task(self._load_locked())
        self._tasks.add(task)
        task.add_done_callback(self._loaded)
        return await asyncio.shield(task)

    def _loaded(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be left to hear it; it is in `_error`

    async def _load_locked(self) -> Process:
        async with self._load_lock:
            return await self._load_once()

    async def _load_once(self) -> Process:
        if self._process is not None:
            return self._process
        self._state = "loading" if self._capabilities is None else "reloading"
        settings = await self._make_room()
        process = self._loading = await Process.spawn()
        event("engine_started", pid=process.pid)
        try:
            folders = {"folder": str(self._folder), "live_folder": str(self._live_folder or "")}
            process.send(wire.pack("load", wire.settings_to(settings), **folders))
            answer = await process.receive()
        except Ended:
            code = await process.wait()
            answer = {
                "kind": "failed",
                "value": f"the engine's process {_how(code)} while it loaded the model",
            }
        finally:
            self._loading = None
        if answer["kind"] == "failed":
            await process.end()
            self._state = "failed"
            self._error = answer["value"]
            raise ModelUnavailable(answer["value"])
        loaded = answer["value"]
        self._device, self._compute_type = loaded["device"], loaded["compute_type"]
        self._capabilities = Capabilities(("transcribe", "translate"), tuple(loaded["languages"]), words=True)
        self._process = process
        self._state = "loaded"
        self._error = None
        self._spawn_task(self.note_end(process))
        return process

    async def _make_room(self) -> Settings:
        """With what to load: as configured, or smaller where the card has no room and that is allowed."""
        if self.peace is None:
            return self._settings
        try:
            return await self.peace.before_load()
        except ApiError:
            self._state = "unloaded"
            raise

    async def _unload(self) -> None:
        if self._idle.active or self._process is None:
            return
        await self._end()
        event("model_unloaded", model=self._settings.model)

    async def _end(self) -> None:
        async with self._load_lock:  # the next one is started when this one's memory is free
            process, self._process = self._process, None
            if process is not None:
                await process.end()
            self._state = "unloaded"

    # -- for transcriptions

    async def load(self) -> Process:
        """ApiError (503) if that fails."""
        try:
            return await self._load()
        except ModelUnavailable as error:
            event("model_load_failed", level=logging.ERROR, error=str(error))
            raise errors.load_failed() from error

    async def end(self, process: Process) -> None:
        """It ran out of memory: only its end returns all of that."""
        if self._process is process:
            await self._end()

    def note_success(self) -> None:
        self._failures = 0

    # -- beside it

    def _spawn_task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def note_end(self, process: Process) -> None:
        """It ended, and nobody here ended it: say so once, and start it again."""
        code = await process.wait()
        if self._process is not process or self._stopping:
            return
        self._process = None
        self._state = "unloaded"
        event("engine_ended", level=logging.ERROR, pid=process.pid, how=_how(code))
        if self._settings.ttl < 0:  # else it may be gone at any time: the next request starts it
            self._spawn_task(self._restart())

    async def _restart(self) -> None:
        pause = RESTART_PAUSES[min(self._failures, len(RESTART_PAUSES) - 1)]
        self._failures += 1
        await asyncio.sleep(pause)
        try:
            await self._internal(self._load)
        except (ModelUnavailable, ApiError) as error:
            event("model_load_failed", level=logging.ERROR, error=str(error))


class Transcription:
    """One request, open in the engine's process."""

    def __init__(
        self, engine: ProcessEngine, job: Job[Info | Segment], source: Source, options: Options
    ) -> None:
        self._engine = engine
        self._job = job
        self._source = source
        self._options = options
        self._process: Process | None = None
        self._number = -1
        self._begun = False  # a step of it has run
        self._ended = False

    async def prepare(self) -> None:
        """Twice if the process ends meanwhile: nothing was computed yet, and the other may be to blame."""
        for last in (False, True):
            try:
                self._process = process = await self._engine.load()
                self._number = process.ask(self._source, self._options)
                info = await self._receive(process)
                break
            except Ended as error:
                await self._engine.note_end(process)
                if last:
                    raise errors.engine_down() from error
        self._job.emit(wire.info_from(info["value"]))

    async def step(self) -> bool:
        process = self._process
        if process is None:
            raise errors.internal()
        if not process.alive and not self._begun:
            process = await self._again(process)
        self._begun = True
        stopping = asyncio.create_task(self._stop_when_cancelled(process))
        try:
            process.step(self._number)
            message = await self._receive(process)
        except Ended as error:
            await self._engine.note_end(process)
            raise errors.engine_down() from error
        finally:
            stopping.cancel()
        if message["kind"] == "segment":
            self._job.emit(wire.segment_from(message["value"]))
            return True
        self._ended = True
        self._engine.note_success()
        return False

    async def _again(self, process: Process) -> Process:
        """The process ended while this one waited for its first step: prepare it once more."""
        await self._engine.note_end(process)
        try:
            self._process = process = await self._engine.load()
            self._number = process.ask(self._source, self._options)
            await self._receive(process)
        except Ended as error:
            await self._engine.note_end(process)
            raise errors.engine_down() from error
        return process

    def close(self) -> None:
        if self._process is not None:
            self._process.close(self._number, self._ended)

    async def _receive(self, process: Process) -> dict[str, Any]:
        message = await process.receive(self._number)
        if message["kind"] == "error":
            self._ended = True
            error = wire.error_from(message["value"])
            if error.code == "out_of_memory":
                await self._engine.end(process)
            raise error
        return message

    async def _stop_when_cancelled(self, process: Process) -> None:
        await self._job.cancelled.wait()
        await asyncio.sleep(PATIENCE)
        event("engine_stuck", level=logging.WARNING, seconds=PATIENCE)
        await process.end()


def _how(code: int) -> str:
    """`code` as a process's return code: negative for a signal."""
    return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
