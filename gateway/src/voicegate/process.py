"""The engine `builtin` as the server sees it: a process that can be ended at any time.

Only the end of a process returns all of its memory, a CUDA context included. So unloading ends it, and
so does running out of memory. A process that ended by itself is started again, and the request it was
working on gets an error that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import logging
import socket
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from voicegate import errors, wire
from voicegate.engine import Capabilities, Info, LoadState, Options, Rank, Segment, Source, Status
from voicegate.errors import ApiError, ModelUnavailable
from voicegate.logs import event, request_id
from voicegate.peace import Peace
from voicegate.settings import Settings
from voicegate.worker import Job, Worker, stream

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
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @classmethod
    async def spawn(cls) -> Process:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "voicegate.engine_process", str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        self = cls(process, ours)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=wire.LINE_LIMIT)
        return self

    async def receive(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
        except ConnectionError as error:
            raise Ended from error
        if not line.endswith(b"\n"):
            raise Ended
        return wire.unpack(line)

    def send(self, message: bytes) -> None:
        self._writer.write(message)

    def ask(self, source: Source, options: Options) -> int:
        """Hand a transcription over; the number cancels it."""
        number = next(self._numbers)
        message = wire.pack("transcribe", options, number=number, request_id=request_id.get())
        try:
            sent = socket.send_fds(self._connection, [message], [source.descriptor()])
        except OSError as error:
            raise Ended from error
        if sent < len(message):
            self._writer.write(message[sent:])
        return number

    def cancel(self, number: int) -> None:
        self.send(wire.pack("cancel", number))

    async def wait(self) -> int:
        return await self._process.wait()

    async def end(self) -> None:
        """All of its memory is free when this returns."""
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class ProcessEngine:
    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._worker = Worker(settings.queue_limit)
        self._process: Process | None = None
        self._loading: Process | None = None
        self._state: LoadState = "loading"
        self._error: str | None = None
        self._device = settings.device
        self._compute_type = settings.compute_type
        self._capabilities: Capabilities | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._active = 0
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
        self._rest()

    def idle(self) -> bool:
        return not self._active and not self._worker.running

    def on_card(self) -> bool:
        return self._process is not None

    async def stop(self) -> None:
        self._stopping = True
        if self.peace is not None:
            await self.peace.stop()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
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
        self, source: Source, options: Options, rank: Rank = Rank.INTERACTIVE
    ) -> AsyncGenerator[Info | Segment, None]:
        async def run(job: Job[Info | Segment]) -> None:
            await self._transcribe(job, source, options)

        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._active += 1
        try:
            async with contextlib.aclosing(stream(self._worker, run, rank)) as items:
                async for item in items:
                    yield item
        finally:
            self._active -= 1
            self._rest()

    async def unload(self) -> None:
        """End the process after what runs; the next request starts one."""
        await self._internal(self._unload)

    # -- one at a time, in the worker

    async def _internal(self, work: Any) -> None:
        async def run(job: Job[None]) -> None:
            await work()

        async with contextlib.aclosing(stream(self._worker, run, Rank.SERVER)) as items:
            async for _unused in items:
                pass

    async def _load(self) -> Process:
        if self._process is not None:
            return self._process
        self._state = "loading" if self._capabilities is None else "reloading"
        settings = await self._make_room()
        process = self._loading = await Process.spawn()
        event("engine_started", pid=process.pid)
        try:
            process.send(wire.pack("load", wire.settings_to(settings), folder=str(self._folder)))
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
        self._spawn_task(self._note_end(process))
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
        if self._active or self._process is None:
            return
        await self._end()
        event("model_unloaded", model=self._settings.model)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.end()
        self._state = "unloaded"

    async def _transcribe(self, job: Job[Info | Segment], source: Source, options: Options) -> None:
        try:
            process = await self._load()
        except ModelUnavailable as error:
            event("model_load_failed", level=logging.ERROR, error=str(error))
            raise errors.load_failed() from error
        if job.cancelled.is_set():
            return
        stopping: asyncio.Task[None] | None = None
        try:
            try:
                number = process.ask(source, options)
            except Ended:  # while it had nothing to do, a moment ago
                await self._note_end(process)
                process = await self._load()
                number = process.ask(source, options)
            stopping = asyncio.create_task(self._stop_when_cancelled(job, process, number))
            while True:
                message = await process.receive()
                match message["kind"]:
                    case "info":
                        job.emit(wire.info_from(message["value"]))
                    case "segment":
                        job.emit(wire.segment_from(message["value"]))
                    case "error":
                        raise wire.error_from(message["value"])
                    case _:
                        self._failures = 0
                        return
        except ModelUnavailable as error:
            raise errors.load_failed() from error
        except Ended as error:
            await self._note_end(process)
            raise errors.engine_down() from error
        except ApiError as error:
            if error.code == "out_of_memory":
                await self._end()
            raise
        finally:
            if stopping is not None:
                stopping.cancel()

    async def _stop_when_cancelled(self, job: Job[Info | Segment], process: Process, number: int) -> None:
        await job.cancelled.wait()
        process.cancel(number)
        await asyncio.sleep(PATIENCE)
        event("engine_stuck", level=logging.WARNING, seconds=PATIENCE)
        await process.end()

    # -- beside it

    def _spawn_task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _note_end(self, process: Process) -> None:
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

    def _rest(self) -> None:
        """Start counting towards unloading, once nothing is left to do."""
        ttl = self._settings.ttl
        if ttl < 0 or self._active or self._process is None or self._stopping:
            return
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = asyncio.get_running_loop().call_later(ttl, self._expire)

    def _expire(self) -> None:
        if not self._active:
            self._spawn_task(self.unload())


def _how(code: int) -> str:
    """`code` as a process's return code: negative for a signal."""
    return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
