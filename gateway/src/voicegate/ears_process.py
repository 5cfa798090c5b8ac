"""The ears' process: `python -m voicegate.ears_process DESCRIPTOR`, started by `ears`.

It decodes what live sessions send and finds the speech in it, so that neither costs the server or the engine
any time, and so that silence never reaches the engine. A session is a thread and a socket of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from voicegate import errors, logs, streams, wire
from voicegate.ears_wire import HEAD, Turn, pack, unpack
from voicegate.errors import ApiError
from voicegate.hearing import Dropped, Heard, Hearing, Started, Utterance
from voicegate.vad import Listening, Silero


def turn_from(value: dict[str, Any] | None) -> Turn | None:
    return None if value is None else Turn(**value)


class Session:
    """One live session, in a thread of its own."""

    def __init__(self, connection: socket.socket, opened: dict[str, Any], silero: Silero) -> None:
        with connection:
            self._file = connection.makefile("rwb")
        self._silero = silero
        self._format: str = opened["format"]
        self._rate: int = opened["rate"]
        self._request_id: str = opened["request_id"]
        turn = turn_from(opened["turn"])
        self._hearing = Hearing(turn, self._listening(turn))

    def _listening(self, turn: Turn | None) -> Listening | None:
        return self._silero.listen() if turn is not None else None

    def run(self) -> None:
        logs.request_id.set(self._request_id)
        with contextlib.suppress(ConnectionError), self._file:
            try:
                for samples in streams.samples(self._format, self._rate, self._next_audio):
                    self._tell(self._hearing.feed(samples))
                self._tell(self._hearing.flush())
                self._send("ended", {"seconds": self._hearing.seconds})
            except ApiError as error:
                self._send("error", wire.error_to(error))
            except ConnectionError:
                raise
            except Exception:
                logs.logger.exception("listening_failed")
                self._send("error", wire.error_to(errors.internal()))

    def _next_audio(self) -> bytes:
        """The next piece of audio; what else is asked meanwhile is done where the audio has come to."""
        while True:
            head = self._file.read(HEAD.size)
            if len(head) < HEAD.size:
                raise ConnectionResetError  # the server let go of this session
            text, data = (self._file.read(size) for size in HEAD.unpack(head))
            message = unpack(text)
            match message["kind"]:
                case "audio":
                    if data:
                        return data
                case "end":
                    return b""
                case "snapshot":
                    self._send_utterance("snapshot", self._hearing.snapshot())
                case "flush":
                    self._send("flushed", self._tell(self._hearing.flush()))
                case "clear":
                    self._tell(self._hearing.clear())
                case "turn":
                    turn = turn_from(message["value"])
                    self._tell(self._hearing.change(turn, self._listening(turn)))

    def _tell(self, found: Iterator[Heard]) -> int:
        """How many utterances were among it."""
        count = 0
        for item in found:
            match item:
                case Started():
                    self._send("started", dataclasses.asdict(item))
                case Utterance():
                    count += 1
                    self._send_utterance("utterance", item)
                case Dropped():
                    self._send("dropped")
        return count

    def _send_utterance(self, kind: str, item: Utterance | None) -> None:
        if item is None:
            self._send(kind)
            return
        value = {name: found for name, found in vars(item).items() if name != "samples"}
        self._send(kind, value, item.samples.astype("<i2").tobytes())

    def _send(self, kind: str, value: Any = None, data: bytes = b"") -> None:
        self._file.write(pack(kind, value, data))
        self._file.flush()


def main() -> None:
    # Ctrl-C and systemd signal the whole group; the server decides when this ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    silero: Silero | None = None
    pending = bytearray()
    files: list[int] = []
    while True:
        try:
            data, more, _flags, _address = socket.recv_fds(connection, 65536, 16)
        except ConnectionError:
            os._exit(0)
        if not data:  # the server is gone
            os._exit(0)
        files += more
        pending += data
        *lines, pending = pending.split(b"\n")
        for line in lines:
            opened = wire.unpack(bytes(line))["value"]
            logs.configure(opened["log_level"], opened["log_format"])
            silero = silero or Silero()
            session = Session(socket.socket(fileno=files.pop(0)), opened, silero)
            threading.Thread(target=session.run, daemon=True).start()


if __name__ == "__main__":
    main()
