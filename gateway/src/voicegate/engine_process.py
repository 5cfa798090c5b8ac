"""The engine's process: `python -m voicegate.engine_process DESCRIPTOR`, started by `process`.

The main thread computes; a second one listens, so that a cancellation is seen between two segments and
the process ends as soon as the server does, however that ended.
"""

from __future__ import annotations

import collections
import functools
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from voicegate import errors, logs, wire
from voicegate.engine import Info
from voicegate.errors import ApiError, ModelUnavailable


class Channel:
    def __init__(self, connection: socket.socket) -> None:
        self.commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.files: collections.deque[int] = collections.deque()
        self._connection = connection
        self._cancelled: set[int] = set()

    def send(self, kind: str, value: Any = None) -> None:
        self._connection.sendall(wire.pack(kind, value))

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
                if message["kind"] == "cancel":
                    self._cancelled.add(message["value"])
                else:
                    self.commands.put(message)


def main() -> None:
    # Ctrl-C and systemd signal the whole group; the server decides when the engine ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    threading.Thread(target=channel.listen, name="voicegate-listen", daemon=True).start()
    load = channel.commands.get()
    settings = wire.settings_from(load["value"])
    logs.configure(settings.log_level)

    from voicegate.whisper import Whisper  # seconds, so only now that the server is listened to

    try:
        whisper = Whisper(settings, Path(load["folder"]))
    except ModelUnavailable as error:
        channel.send("failed", str(error))
        return
    channel.send(
        "loaded",
        {"device": whisper.device, "compute_type": whisper.compute_type, "languages": whisper.languages},
    )
    while True:
        command = channel.commands.get()
        number = command["number"]
        token = logs.request_id.set(command["request_id"])
        with os.fdopen(channel.files.popleft(), "rb") as source:
            try:
                cancelled = functools.partial(channel.cancelled, number)
                for item in whisper.transcribe(source, wire.options_from(command["value"]), cancelled):
                    channel.send("info" if isinstance(item, Info) else "segment", item)
                channel.send("end")
            except ApiError as error:
                channel.send("error", wire.error_to(error))
            except Exception:
                logs.logger.exception("transcription_failed")
                channel.send("error", wire.error_to(errors.internal()))
        channel.forget(number)
        logs.request_id.reset(token)


if __name__ == "__main__":
    main()
