# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client side of a websocket (RFC 6455), and commands in instances on top of it.

Only what the Incus API needs: no extensions, no fragmented messages from us. Sockets do not block;
`run_command` drives all streams of a command from one loop, so neither a large input nor a
large output can stop the other.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import secrets as random_secrets
import selectors
import socket
import struct
import time
import typing as t
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    IncusClient,
    IncusError,
    IncusOperationFailed,
    IncusTimeout,
    operation_failure,
    operation_result,
)

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_HEAD_LIMIT = 1 << 16
_FRAME_LIMIT = 1 << 26
# Bytes taken from one stream before the others get their turn: what bounds memory in a transfer.
_TURN = 1 << 20
CHUNK = 1 << 17
# How long after a command's end its streams may still bring something.
DRAIN_GRACE = 5.0
KILL_GRACE = 10.0
_NO_PROGRAM = {"Command not found": 127, "Command not executable": 126}
# In the environment of every command, so that an interrupted one can be found with all it started.
MARK = "ANSIBLE_INCUS_EXEC"


class WebSocketError(Exception):
    """The other side does not speak the protocol, or refused the handshake with `status`."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """One whole masked frame. The mask is zero, which leaves the payload as it is.

    Masking protects proxies from scripts in browsers; there are neither here.
    """
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    return head + b"\0\0\0\0" + payload


class FrameReader:
    """Takes bytes as they come, gives whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        self._buffer += data
        frames: list[tuple[int, bytes]] = []
        start = 0
        while (found := self._next(start)) is not None:
            opcode, payload, start = found
            frames.append((opcode, payload))
        del self._buffer[:start]
        return frames

    def _next(self, start: int) -> tuple[int, bytes, int] | None:
        data = self._buffer
        if len(data) - start < 2:
            return None
        first, second = data[start], data[start + 1]
        if first & 0x70:
            raise WebSocketError("a frame uses an extension that was not agreed on")
        size, body = second & 0x7F, start + 2
        if size >= 126:
            width = 2 if size == 126 else 8
            if len(data) - body < width:
                return None
            size = int.from_bytes(data[body : body + width], "big")
            body += width
        if size > _FRAME_LIMIT:
            raise WebSocketError(f"a frame of {size} bytes is too large")
        mask = b""
        if second & 0x80:
            mask = bytes(data[body : body + 4])
            body += 4
        if len(data) - body < size:
            return None
        payload = bytes(data[body : body + size])
        if mask.strip(b"\0"):
            payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        return first & 0x0F, payload, body + size


class WebSocket:
    """A websocket over a connected socket. `handshake()` first; after it nothing blocks."""

    def __init__(
        self,
        sock: socket.socket,
        target: str,
        *,
        host: str = "incus",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sock = sock
        self._clock = clock
        self._key = base64.b64encode(os.urandom(16))
        self._reader = FrameReader()
        self._out = bytearray()
        self._early: list[tuple[int, bytes]] = []
        self.ended = False  # nothing more will come
        self.clean = False  # and it ended by an end-of-stream message, not by a broken connection
        self.broken: OSError | None = None  # sending has failed
        head = (
            f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {self._key.decode()}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._sock.sendall(head.encode())

    def fileno(self) -> int:
        return self._sock.fileno()

    def handshake(self, deadline: float) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            left = deadline - self._clock()
            if left <= 0:
                raise TimeoutError("no answer to the websocket handshake")
            self._sock.settimeout(left)
            block = self._sock.recv(4096)
            data += block
            if not block or len(data) > _HEAD_LIMIT:
                raise WebSocketError("the websocket handshake was cut off")
        head, _unused, rest = data.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        status = lines[0].split(b" ", 2)
        if len(status) < 2 or not status[1].isdigit():
            raise WebSocketError(f"no HTTP answer to the websocket handshake: {lines[0][:80]!r}")
        code = int(status[1])
        if code != 101:
            raise WebSocketError(f"HTTP {code} to the websocket handshake: {rest[:200]!r}", code)
        fields = {
            name.strip().lower(): value.strip()
            for name, _unused, value in (line.partition(b":") for line in lines[1:])
        }
        expected = base64.b64encode(hashlib.sha1(self._key + _GUID, usedforsecurity=False).digest())
        if fields.get(b"sec-websocket-accept") != expected:
            raise WebSocketError("the websocket handshake was answered with a wrong key")
        self._sock.setblocking(False)
        if rest:
            self._early = self._reader.feed(rest)

    # sending

    @property
    def pending(self) -> bool:
        return bool(self._out) and self.broken is None

    def queue(self, opcode: int, payload: bytes) -> None:
        self._out += encode_frame(opcode, payload)

    def flush(self) -> None:
        """Send what the connection takes now. A failure is kept in `broken`, not raised."""
        while self.pending:
            try:
                with memoryview(self._out) as view:
                    sent = self._sock.send(view[:CHUNK])
            except OSError as exc:
                if not _would_block(exc):
                    self.broken = exc
                return
            del self._out[:sent]

    # receiving

    def receive(self) -> list[bytes]:
        """The data that is there now, at most about _TURN bytes; sets `ended` and `clean`."""
        data: list[bytes] = []
        self._take(self._early, data)
        self._early = []
        got = 0
        while not self.ended and got < _TURN:
            try:
                block = self._sock.recv(1 << 16)
            except OSError as exc:
                if _would_block(exc):
                    break
                block = b""
            if not block:
                self.ended = True
                break
            got += len(block)
            self._take(self._reader.feed(block), data)
        return data

    @property
    def buffered(self) -> bool:
        """Whether receive() has something that the selector cannot see."""
        waiting = getattr(self._sock, "pending", None)
        return bool(self._early) or (waiting is not None and not self.ended and waiting() > 0)

    def _take(self, frames: list[tuple[int, bytes]], data: list[bytes]) -> None:
        for opcode, payload in frames:
            if opcode == PING:
                self.queue(PONG, payload)
            elif opcode == CLOSE or (opcode == TEXT and not payload):
                # Incus marks the end of a stream with an empty text message.
                self.ended = self.clean = True
            elif opcode in (TEXT, BINARY, CONTINUATION) and not self.ended:
                data.append(payload)

    def abort(self) -> None:
        self._sock.close()


def _would_block(exc: OSError) -> bool:
    # By name: ssl is only imported when a remote is used.
    return isinstance(exc, (BlockingIOError, InterruptedError)) or type(exc).__name__ in (
        "SSLWantReadError",
        "SSLWantWriteError",
    )


@dataclasses.dataclass
class CommandResult:
    returncode: int
    stdout: bytes
    stderr: bytes
    # Whether all of the input was taken, and all of the output came whole.
    input_sent: bool = True
    output_whole: bool = True


class Gate:
    """Holds a command's input back until the command is ready for it (a password prompt)."""

    def decide(self, stdout: bytes, stderr: bytes) -> bytes | bool:
        """True opens; bytes are sent as an answer; False waits. May raise."""
        raise NotImplementedError


class Interrupted(BaseException):
    """Raised by a signal handler while a command runs: the command is killed and cleaned up."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def run_command(
    client: IncusClient,
    instance: str,
    command: Sequence[str],
    *,
    project: str | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: int | None = None,
    group: int | None = None,
    stdin: bytes | t.BinaryIO | None = None,
    stdout: Callable[[bytes], t.Any] | None = None,
    timeout: float | None = None,
    stall: float | None = None,
    gate: Gate | None = None,
    gate_timeout: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    mark: str | None = None,
) -> CommandResult:
    """Run a command in an instance and give its exit code and output.

    `stdin` may be a file and `stdout` a function: then memory is bounded whatever the size.
    After `timeout` seconds, after `stall` seconds without a byte either way, and whenever an
    exception interrupts the wait, the command is killed together with what it started.
    """
    deadline = None if timeout is None else clock() + timeout
    mark = mark or random_secrets.token_hex(8)
    body: dict[str, t.Any] = {
        "command": list(command),
        "environment": {**(environment or {}), MARK: mark},
        "interactive": False,
        "wait-for-websocket": True,
    }
    if cwd is not None:
        body["cwd"] = cwd
    if user is not None:
        body["user"] = user
    if group is not None:
        body["group"] = group
    path = f"/1.0/instances/{quote(instance, safe='')}/exec"
    response = client.request("POST", path, project=project, body=body)
    fds = ((response.metadata or {}).get("metadata") or {}).get("fds") or {}
    operation = response.operation
    if operation is None or not {"0", "1", "2"} <= set(fds):
        raise IncusError(f"Incus answered {path} without the streams of the command.", path=path)
    streams = client.upgrade_all(operation, [fds["0"], fds["1"], fds["2"]])
    session: _Session | None = None
    try:
        session = _Session(client, instance, operation, streams, stdin, stdout, gate, gate_timeout, clock)
        return session.run(deadline, timeout, stall)
    except BaseException:
        if session is None or session.finished is None:
            kill_command(client, instance, mark, project=project)
        raise
    finally:
        for stream in streams:
            stream.abort()
        if session is not None:
            session.close()


class _Session:
    """One running command: its three streams and the wait for its end, in one loop."""

    def __init__(
        self,
        client: IncusClient,
        instance: str,
        operation: str,
        streams: list[WebSocket],
        stdin: bytes | t.BinaryIO | None,
        sink: Callable[[bytes], t.Any] | None,
        gate: Gate | None,
        gate_timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self.client, self.instance, self.operation = client, instance, operation
        self.stdin, self.stdout, self.stderr = streams
        self.source = _chunks(stdin)
        self.input_done = False  # all of it is queued
        self.input_sent = False  # and has left
        self.collected: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self.sink = sink
        self.gate = gate
        self.gate_timeout = gate_timeout
        self.clock = clock
        path, _unused, tail = operation.partition("?")
        self.pending = client.start("GET", f"{path}/wait?{tail + '&' if tail else ''}timeout=-1")
        self.metadata: t.Any = None
        self.finished: float | None = None
        self.moved = clock()
        self.selector = selectors.DefaultSelector()

    def close(self) -> None:
        self.selector.close()
        self.pending.cancel()

    def run(self, deadline: float | None, timeout: float | None, stall: float | None) -> CommandResult:
        gate_deadline = None if self.gate is None else self.clock() + self.gate_timeout
        watched: dict[t.Any, int] = {}
        while True:
            self._pump_input()
            if self.finished is not None and self._drained():
                break
            self._watch(watched)
            now = self.clock()
            limits = [
                None if self.finished is None else self.finished + DRAIN_GRACE,
                deadline,
                gate_deadline if self.gate is not None else None,
                None if stall is None else self.moved + stall,
            ]
            left = min((limit - now for limit in limits if limit is not None), default=None)
            buffered = any(stream.buffered for stream in (self.stdin, self.stdout, self.stderr))
            events = self.selector.select(0 if buffered else left if left is None else max(left, 0))
            ready = {key.fileobj for key, _unused in events}
            for stream, name in ((self.stdin, ""), (self.stdout, "stdout"), (self.stderr, "stderr")):
                if stream in ready or stream.buffered:
                    stream.flush()
                    self._note_sent()
                    self._collect(stream, name)
            if self.gate is not None:
                self._ask(self.gate)
            if self.pending in ready and self.finished is None:
                self._end()
            now = self.clock()
            if self.finished is not None:
                if now >= self.finished + DRAIN_GRACE:
                    break
            elif deadline is not None and now >= deadline:
                raise IncusTimeout(
                    f"The command in instance {self.instance} did not end within {timeout:g} s and was"
                    " killed. Raise the timeout if it needs longer."
                )
            elif stall is not None and now >= self.moved + stall:
                raise IncusTimeout(
                    f"The transfer with instance {self.instance} stood still for {stall:g} s and was given"
                    " up."
                )
            elif self.gate is not None and gate_deadline is not None and now >= gate_deadline:
                raise IncusTimeout(
                    f"Privilege escalation in instance {self.instance} did not get ready within"
                    f" {self.gate_timeout:g} s; it said: {self._said()!r}. Check become_method, become_user"
                    " and the password."
                )
        return self._result()

    def _said(self) -> str:
        return (
            bytes(self.collected["stderr"] + self.collected["stdout"])[-500:]
            .decode("utf-8", "replace")
            .strip()
        )

    def _watch(self, watched: dict[t.Any, int]) -> None:
        wanted: dict[t.Any, int] = {}
        for stream in (self.stdin, self.stdout, self.stderr):
            events = 0 if stream.ended else selectors.EVENT_READ
            if stream.pending:
                events |= selectors.EVENT_WRITE
            if events:
                wanted[stream] = events
        if self.finished is None:
            wanted[self.pending] = selectors.EVENT_READ
        for item in [item for item in watched if item not in wanted]:
            self.selector.unregister(item)
            del watched[item]
        for item, events in wanted.items():
            if item not in watched:
                self.selector.register(item, events)
            elif watched[item] != events:
                self.selector.modify(item, events)
            watched[item] = events

    def _pump_input(self) -> None:
        """Keep at most one chunk of input waiting in memory."""
        while (
            self.gate is None
            and not self.input_done
            and not self.stdin.pending
            and self.stdin.broken is None
            and not self.stdin.ended
        ):
            chunk = next(self.source, None)
            if chunk is None:
                self.input_done = True
                self.stdin.queue(TEXT, b"")
            else:
                self.stdin.queue(BINARY, chunk)
                self.moved = self.clock()
            self.stdin.flush()
            self._note_sent()

    def _note_sent(self) -> None:
        # Noted at once: a late answer to a ping may still find the connection closed.
        if self.input_done and not self.stdin.pending and self.stdin.broken is None:
            self.input_sent = True

    def _collect(self, stream: WebSocket, name: str) -> None:
        for block in stream.receive():
            self.moved = self.clock()
            if name == "stdout" and self.sink is not None:
                self.sink(block)
            elif name:
                self.collected[name] += block

    def _ask(self, gate: Gate) -> None:
        if self.stdout.ended and self.stderr.ended:
            self.gate = None
            return
        answer = gate.decide(bytes(self.collected["stdout"]), bytes(self.collected["stderr"]))
        if answer is True:
            self.gate = None
        elif answer:
            self.stdin.queue(BINARY, answer)
            self.stdin.flush()

    def _end(self) -> None:
        what = f"the command in instance {self.instance}"
        try:
            answer = self.pending.poll()
            if answer is None:
                return
            done, metadata = operation_result(answer.metadata, what, self.operation)
        except IncusError as exc:
            failure = operation_failure(exc, what, self.operation)
            if failure is None:
                raise
            metadata, done = self._exit_code(failure), True
        if not done:
            raise IncusError(f"Incus left {what} in an unknown state.")
        self.metadata = metadata
        self.finished = self.clock()

    def _exit_code(self, failure: IncusOperationFailed) -> dict[str, t.Any]:
        """Incus takes the exit codes 126 and 127 for failures of its own; the code is in the operation."""
        code = _NO_PROGRAM.get(failure.detail or "")
        if code is None:
            self.finished = self.clock()
            raise failure from None
        return {"return": code}

    def _drained(self) -> bool:
        return self.stdout.ended and self.stderr.ended

    def _result(self) -> CommandResult:
        code = (self.metadata or {}).get("return")
        if not isinstance(code, int):
            raise IncusError(f"Incus lost the exit code of the command in instance {self.instance}.")
        return CommandResult(
            returncode=code,
            stdout=bytes(self.collected["stdout"]),
            stderr=bytes(self.collected["stderr"]),
            input_sent=self.input_sent,
            output_whole=self.stdout.clean and self.stderr.clean,
        )


def _chunks(source: bytes | t.BinaryIO | None) -> t.Iterator[bytes]:
    if source is None:
        return
    if isinstance(source, (bytes, bytearray)):
        for start in range(0, len(source), CHUNK):
            yield bytes(source[start : start + CHUNK])
        return
    while block := source.read(CHUNK):
        yield block


# Everything whose environment bears the mark, and all of its descendants (sudo empties the
# environment): first asked to end, then killed.
_KILL = """
pids=
for file in $(grep -ls "$1=$2" /proc/[0-9]*/environ); do
  pid=${file#/proc/}; pids="$pids ${pid%/environ} "
done
more=yes
while [ -n "$more" ]; do
  more=
  for stat in /proc/[0-9]*/stat; do
    read -r line 2>/dev/null <"$stat" || continue
    pid=${line%% *}; set -- ${line##*) }
    case "$pids" in *" $pid "*) continue ;; esac
    case "$pids" in *" $2 "*) pids="$pids $pid "; more=yes ;; esac
  done
done
[ -n "$pids" ] || exit 0
kill -TERM $pids 2>/dev/null
for try in 1 2 3 4 5 6 7 8 9 10; do
  kill -0 $pids 2>/dev/null || exit 0
  sleep 0.1
done
kill -KILL $pids 2>/dev/null
exit 0
"""


def kill_command(client: IncusClient, instance: str, mark: str, *, project: str | None = None) -> bool:
    """Kill what a command left running; False if that could not be done (the instance is gone, say)."""
    twin = client.clone()
    twin.timeout = min(client.timeout, KILL_GRACE)
    body = {
        "command": ["/bin/sh", "-c", _KILL, "kill", MARK, mark],
        "environment": {},
        "interactive": False,
        "wait-for-websocket": False,
        "user": 0,
        "group": 0,
    }
    path = f"/1.0/instances/{quote(instance, safe='')}/exec"
    try:
        with twin:
            twin.run("POST", path, project=project, body=body, wait_timeout=KILL_GRACE)
    except IncusError:
        return False
    return True


__all__ = [
    "CommandResult",
    "FrameReader",
    "Gate",
    "Interrupted",
    "WebSocket",
    "WebSocketError",
    "encode_frame",
    "kill_command",
    "run_command",
]
