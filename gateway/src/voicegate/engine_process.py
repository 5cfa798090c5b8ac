"""The engine's process: `python -m voicegate.engine_process DESCRIPTOR`, started by `process`.

The main thread computes, one step of one transcription when the server asks for it. One thread listens, so
that the process ends as soon as the server does, however that ended. Each transcription is prepared by a
thread of its own: reading a long file must not hold up a short one.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import functools
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from voicegate import errors, logs, wire
from voicegate.engine import Info, Segment
from voicegate.errors import ApiError, ModelUnavailable

if TYPE_CHECKING:
    from voicegate.whisper import Whisper


M_ARENA_MAX = -8  # malloc.h
LONG = 300.0  # seconds of audio after which memory is given back to the system


class Channel:
    def __init__(self, connection: socket.socket) -> None:
        self.commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.files: collections.deque[int] = collections.deque()
        self._connection = connection
        self._sending = threading.Lock()
        self._cancelled: set[int] = set()

    def send(self, kind: str, value: Any = None, number: int | None = None) -> None:
        with self._sending:
            self._connection.sendall(wire.pack(kind, value, number=number))

    def cancelled(self, number: int) -> bool:
        return number in self._cancelled

    def forget(self, number: int) -> None:
        self._cancelled.discard(number)

    def listen(self) -> None:
        pending = bytearray()
        while True:
            try:
                data, files, _flags, _address = socket.recv_fds(self._connection, 65536, 4)
            except ConnectionError:  # killed before it had read everything
                os._exit(0)
            if not data:  # the server is gone: nothing here is of use to anybody
                os._exit(0)
            self.files.extend(files)
            pending += data
            *lines, rest = pending.split(b"\n")
            pending = rest
            for line in lines:
                message = wire.unpack(bytes(line))
                if message["kind"] == "cancel":  # seen while it is prepared
                    self._cancelled.add(message["number"])
                self.commands.put(message)


def connect() -> Channel:
    """To the server that started this process, whose descriptor is the first argument."""
    # Ctrl-C and systemd signal the whole group; the server decides when the engine ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    threading.Thread(target=channel.listen, name="voicegate-listen", daemon=True).start()
    return channel


def main() -> None:
    limit_arenas()
    channel = connect()
    load = channel.commands.get()
    settings = wire.settings_from(load["value"])
    logs.configure(settings.log_level, settings.log_format)

    from voicegate.decoder import Decoder
    from voicegate.whisper import Whisper  # seconds, so only now that the server is listened to

    decoder = Decoder(settings)
    try:
        whisper = Whisper(settings, Path(load["folder"]), decoder)
        small = whisper
        if load["live_folder"]:
            small = Whisper(
                dataclasses.replace(settings, model=settings.live_model), Path(load["live_folder"]), decoder
            )
    except ModelUnavailable as error:
        channel.send("failed", str(error))
        return
    channel.send(
        "loaded",
        {"device": whisper.device, "compute_type": whisper.compute_type, "languages": whisper.languages},
    )
    Transcriptions(channel, whisper, small).serve()


class Open(NamedTuple):
    """A transcription with what is left of it."""

    request_id: str
    segments: Iterator[Segment]
    duration: float  # seconds of audio


class Transcriptions:
    """Those that are open, each where it was left."""

    def __init__(self, channel: Channel, whisper: Whisper, small: Whisper) -> None:
        self._channel = channel
        self._whisper = whisper
        self._small = small  # for drafts; the same one, if there is no other
        self._open: dict[int, Open] = {}

    def serve(self) -> None:
        while True:
            command = self._channel.commands.get()
            match command["kind"]:
                case "transcribe":
                    file = self._channel.files.popleft()
                    threading.Thread(target=self._prepare, args=(command, file), daemon=True).start()
                case "step":
                    self._step(command["number"])
                case "prepared":
                    self._prepared(command)
                case "cancel":
                    if command["number"] in self._open:
                        self._channel.forget(command["number"])
                        self._close(command["number"])

    def _prepare(self, command: dict[str, Any], file: int) -> None:
        number = command["number"]
        opened: tuple[Info, Iterator[Segment]] | None = None
        logs.request_id.set(command["request_id"])
        with os.fdopen(file, "rb") as source, self._told(number):
            cancelled = functools.partial(self._channel.cancelled, number)
            options = wire.options_from(command["value"])
            whisper = self._small if options.draft else self._whisper
            opened = whisper.open(source, options, cancelled)
        # Back to the main thread, which alone knows what is open.
        self._channel.commands.put(
            {"kind": "prepared", "number": number, "request_id": command["request_id"], "opened": opened}
        )

    def _prepared(self, command: dict[str, Any]) -> None:
        number = command["number"]
        if command["opened"] is None or self._channel.cancelled(number):
            self._channel.forget(number)
            return
        info, segments = command["opened"]
        self._open[number] = Open(command["request_id"], segments, info.duration)
        self._channel.send("info", info, number)

    def _step(self, number: int) -> None:
        request_id, segments, _duration = self._open[number]
        token = logs.request_id.set(request_id)
        ended = True
        with self._told(number):
            segment = next(segments, None)
            ended = segment is None
            self._channel.send("end" if ended else "segment", segment, number)
        logs.request_id.reset(token)
        if ended:
            del segments
            self._close(number)

    def _close(self, number: int) -> None:
        if self._open.pop(number).duration >= LONG:
            give_back()

    @contextlib.contextmanager
    def _told(self, number: int) -> Iterator[None]:
        """Failures go to the server."""
        try:
            yield
        except ApiError as error:
            self._channel.send("error", wire.error_to(error), number)
        except Exception:
            logs.logger.exception("transcription_failed")
            self._channel.send("error", wire.error_to(errors.internal()), number)


# Of glibc's malloc; another C library has neither these functions nor what they are needed for.


def limit_arenas() -> None:
    """One heap for all threads: each with its own keeps what it freed, and together they grow for thousands
    of requests."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """What was freed, malloc keeps for the next one, however much it is."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


if __name__ == "__main__":
    main()
