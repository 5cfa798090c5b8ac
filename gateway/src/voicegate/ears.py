"""The ears as the server sees them: a process that is there while anybody has a live session."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
from typing import Any

from voicegate import child, errors, wire
from voicegate.audio_file import wav_header
from voicegate.ears_wire import HEAD, RATE, Turn, pack, unpack
from voicegate.logs import event, request_id
from voicegate.settings import Settings


class Recording:
    """Samples as a file that an engine can read."""

    def __init__(self, data: bytes) -> None:
        self._file = os.fdopen(os.memfd_create("utterance", os.MFD_CLOEXEC), "w+b")
        self._file.write(wav_header(RATE, 2, 1, len(data)) + data)
        self._file.flush()

    def descriptor(self) -> int:
        self._file.seek(0)
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


class Ear:
    """One session's connection to the ears."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, kind: str, value: Any = None, data: bytes = b"") -> None:
        """Waits while the ears are behind. What they cannot take any more is told by `receive`."""
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        with contextlib.suppress(ConnectionError):
            self._writer.write(pack(kind, value, data))
            await self._writer.drain()

    async def receive(self) -> tuple[str, Any, bytes]:
        """The next message; ApiError (503 `ears_down`) if the process ended."""
        try:
            text, data = HEAD.unpack(await self._reader.readexactly(HEAD.size))
            message = unpack(await self._reader.readexactly(text))
            return message["kind"], message["value"], await self._reader.readexactly(data)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise errors.ears_down() from error

    def close(self) -> None:
        self._writer.close()


class Ears:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._open = 0
        self._lock = asyncio.Lock()

    async def open(self, form: str, rate: int, turn: Turn | None) -> Ear:
        """`form`: one of `FORMATS`; `rate`: of `pcm16`, in Hz; no `turn`: only `flush` ends an utterance."""
        value = {
            "format": form, "rate": rate, "turn": dataclasses.asdict(turn) if turn is not None else None,
            "request_id": request_id.get(), "log_level": self._settings.log_level,
            "log_format": self._settings.log_format,
        }  # fmt: skip
        ours, theirs = socket.socketpair()
        with theirs:
            async with self._lock:
                await self._send(wire.pack("open", value), theirs)
        self._open += 1
        return Ear(*await asyncio.open_unix_connection(sock=ours))

    async def _send(self, message: bytes, file: socket.socket) -> None:
        for _attempt in range(2):
            if self._control is None:
                self._process, self._control = await child.spawn("voicegate.ears_process")
                event("ears_started", pid=self._process.pid)
            try:
                # Some hundred bytes: always room for them.
                socket.send_fds(self._control, [message], [file.fileno()])
                return
            except OSError:  # it ended since it was last used
                await self._end()
        raise errors.ears_down()

    async def let_go(self, ear: Ear) -> None:
        """The session has ended; with the last one the process goes, and its memory."""
        ear.close()
        self._open -= 1
        if not self._open:
            async with self._lock:
                if not self._open:
                    await self._end()

    async def stop(self) -> None:
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        process, control = self._process, self._control
        self._process = self._control = None
        if control is not None:
            control.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
