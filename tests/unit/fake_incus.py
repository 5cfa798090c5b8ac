# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small Incus daemon on a unix socket: enough of the API to test the client and the connection.

Answers are given by functions that a test puts into `routes`; commands are run as real local
processes, so their streams behave as in an instance.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import select
import socket
import struct
import subprocess
import threading
import typing as t
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


@dataclasses.dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> t.Any:
        return json.loads(self.body)


@dataclasses.dataclass
class Answer:
    document: t.Any = None
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    raw: bytes | None = None
    close: bool = False  # end the connection after it
    vanish: bool = False  # end it instead of answering


def sync(metadata: t.Any, **kwargs: t.Any) -> Answer:
    return Answer({"type": "sync", "status_code": 200, "metadata": metadata}, **kwargs)


def error(code: int, text: str, status: int | None = None) -> Answer:
    return Answer({"type": "error", "error_code": code, "error": text, "metadata": None}, status or code)


def started(operation: str, metadata: t.Any = None) -> Answer:
    document = {"type": "async", "status_code": 100, "operation": operation, "metadata": metadata or {}}
    return Answer(document, 202)


def ended(metadata: t.Any = None) -> Answer:
    return sync({"status_code": 200, "status": "Success", "metadata": metadata, "err": ""})


class FakeIncus:
    """Serves until `close()`; `log` has every request, `connections` how many were opened."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "incus.socket")
        self.routes: dict[tuple[str, str], Callable[[Request], Answer]] = {}
        self.log: list[Request] = []
        self.connections = 0
        self.execs: dict[str, _Exec] = {}
        self.swallow_after: int | None = None  # close stdin's connection after so many bytes
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.socket)
        self._listener.listen(64)
        self._open: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def route(self, method: str, path: str, answer: Answer | Callable[[Request], Answer]) -> None:
        self.routes[method, path] = answer if callable(answer) else lambda _request: answer

    def instance(self, name: str, status: str = "Running") -> None:
        """An instance that runs commands if its status is Running."""
        self.route("GET", f"/1.0/instances/{name}/state", sync({"status": status}))
        if status == "Running":
            self.route("POST", f"/1.0/instances/{name}/exec", self._start)
        else:
            self.route(
                "POST", f"/1.0/instances/{name}/exec", error(400, f"Instance is not running ({status})")
            )

    def drop_connections(self) -> None:
        for sock in self._open:
            sock.close() if sock.fileno() < 0 else sock.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        # Its thread must have left: it would accept from whoever gets the descriptor's number next.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(10)
        self._listener.close()
        for command in self.execs.values():
            command.kill()

    def _accept(self) -> None:
        while True:
            try:
                sock, _unused = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        stream = sock.makefile("rb")
        try:
            while (request := self._read(stream)) is not None:
                self.log.append(request)
                if request.headers.get("upgrade") == "websocket":
                    self._attach(sock, request)
                    return
                if not self._answer(sock, request):
                    break
        except OSError:
            pass
        finally:
            stream.close()
        sock.close()

    @staticmethod
    def _read(stream: t.BinaryIO) -> Request | None:
        line = stream.readline().split()
        if len(line) < 2:
            return None
        headers: dict[str, str] = {}
        while text := stream.readline().strip():
            name, _unused, value = text.decode().partition(":")
            headers[name.lower()] = value.strip()
        url = urlsplit(line[1].decode())
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = stream.read(int(headers.get("content-length", 0)))
        return Request(line[0].decode(), url.path, query, headers, body)

    def _answer(self, sock: socket.socket, request: Request) -> bool:
        parts = request.path.split("/")
        if len(parts) == 5 and parts[4] == "wait" and parts[3] in self.execs:
            # As the daemon does: the head at once, the rest when the operation ends.
            sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            answer = self.execs[parts[3]].wait()
            data = json.dumps(answer.document).encode()
            sock.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
            return True
        handler = self.routes.get((request.method, request.path))
        answer = handler(request) if handler else error(404, "not found")
        if answer.vanish:
            return False
        data = answer.raw if answer.raw is not None else json.dumps(answer.document).encode()
        head = {"Content-Length": str(len(data)), **answer.headers}
        if answer.close:
            head["Connection"] = "close"
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        sock.sendall(f"HTTP/1.1 {answer.status} X\r\n{lines}\r\n".encode() + data)
        return not answer.close

    def _start(self, request: Request) -> Answer:
        body = request.json
        name = f"op{len(self.execs)}"
        if not body["wait-for-websocket"]:
            subprocess.run(body["command"], check=False, stdin=subprocess.DEVNULL, timeout=20)
            self.route("GET", f"/1.0/operations/{name}x/wait", ended({"return": 0}))
            return started(f"/1.0/operations/{name}x")
        self.execs[name] = _Exec(body, self.swallow_after)
        fds = {"0": f"{name}-0", "1": f"{name}-1", "2": f"{name}-2", "control": f"{name}-c"}
        return started(f"/1.0/operations/{name}", {"metadata": {"fds": fds}})

    def _attach(self, sock: socket.socket, request: Request) -> None:
        name, _unused, number = request.query["secret"].partition("-")
        key = request.headers["sec-websocket-key"].encode()
        accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest()).decode()
        sock.sendall(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
            + frame(0x9, b"keepalive")
        )
        self.execs[name].attach(int(number), sock)


class _Exec:
    def __init__(self, body: dict[str, t.Any], swallow_after: int | None) -> None:
        self.body = body
        self._swallow_after = swallow_after
        self._socks: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._code = 0

    def attach(self, number: int, sock: socket.socket) -> None:
        with self._lock:
            self._socks[number] = sock
            whole = len(self._socks) == 3
        if whole:
            threading.Thread(target=self._run, daemon=True).start()

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def wait(self) -> Answer:
        self._ended.wait(30)
        if self._code == 127:
            return error(400, "Command not found")
        return ended({"return": self._code})

    def _run(self) -> None:
        environment = {**os.environ, **self.body["environment"]}
        try:
            self._process = process = subprocess.Popen(
                self.body["command"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        except FileNotFoundError:
            self._code = 127
            self._finish()
            return
        assert process.stdin
        assert process.stdout
        assert process.stderr
        threads = [
            threading.Thread(target=self._output, args=(process.stdout, self._socks[1]), daemon=True),
            threading.Thread(target=self._output, args=(process.stderr, self._socks[2]), daemon=True),
        ]
        threading.Thread(target=self._input, args=(process.stdin, self._socks[0]), daemon=True).start()
        for thread in threads:
            thread.start()
        self._code = process.wait()
        for thread in threads:
            thread.join()
        self._finish()

    def _finish(self) -> None:
        for sock in self._socks.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._ended.set()

    def _output(self, pipe: t.Any, sock: socket.socket) -> None:
        assert self._process
        try:
            while True:
                # Like the daemon: after the command's end only what is already there.
                ready, _unused, _unused = select.select([pipe, sock], [], [], 0.05)
                if sock in ready and not sock.recv(4096):
                    self.kill()
                    return
                if pipe in ready:
                    block = pipe.read(1 << 15)
                    if not block:
                        break
                    sock.sendall(frame(0x2, block))
                elif self._process.poll() is not None:
                    # It may have written between the two looks.
                    while select.select([pipe], [], [], 0)[0] and (block := pipe.read(1 << 15)):
                        sock.sendall(frame(0x2, block))
                    break
            sock.sendall(frame(0x1, b""))
        except OSError:
            self.kill()

    def _input(self, pipe: t.Any, sock: socket.socket) -> None:
        taken = 0
        try:
            for opcode, payload in frames(sock):
                if opcode == 0x1:
                    break
                if opcode == 0x2:
                    taken += len(payload)
                    if self._swallow_after is not None and taken > self._swallow_after:
                        sock.shutdown(socket.SHUT_RDWR)
                        break
                    pipe.write(payload)
        except OSError:
            pass
        pipe.close()


def frame(opcode: int, payload: bytes) -> bytes:
    """An unmasked frame, as servers send them."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def frames(sock: socket.socket) -> t.Iterator[tuple[int, bytes]]:
    stream = sock.makefile("rb")
    with stream:
        while len(head := stream.read(2)) == 2:
            size = head[1] & 0x7F
            if size == 126:
                size = int.from_bytes(stream.read(2), "big")
            elif size == 127:
                size = int.from_bytes(stream.read(8), "big")
            assert head[1] & 0x80, "clients must mask"
            mask = stream.read(4)
            payload = stream.read(size)
            if mask != b"\0\0\0\0":
                payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
            yield head[0] & 0x0F, payload
