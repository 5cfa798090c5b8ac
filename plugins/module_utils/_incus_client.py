# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of the Incus REST API with nothing but the standard library.

One client keeps one connection and is not thread safe: `clone()` gives a thread its own.
Every wait has a deadline on the monotonic clock, every failure is an `IncusError` whose text
says what failed, where, and what to do.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.client
import io
import json
import math
import os
import re
import select
import socket
import time
import typing as t
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import quote, urlencode, urlsplit

if t.TYPE_CHECKING:
    import ssl
    from types import TracebackType

    from ansible_collections.sottovoce.stack.plugins.module_utils._incus_websocket import WebSocket

DEFAULT_SOCKETS = ("/var/lib/incus/unix.socket", "/run/incus/unix.socket")
BLOCK = 1 << 18
# The daemon forgets an operation five seconds after its end, so one wait must be seamless with the next.
WAIT_SLICE = 60.0
_WAIT_OVER = "context deadline exceeded"
USER_AGENT = "sottovoce.stack"

Body = t.Union[Mapping[str, t.Any], list[t.Any], bytes, None]


# The options of the doc fragment sottovoce.stack.incus, for the argument_spec of modules.
CONNECTION_SPEC: dict[str, dict[str, t.Any]] = {
    "socket": {"type": "path"},
    "remote_url": {"type": "str"},
    "client_cert": {"type": "path"},
    "client_key": {"type": "path", "no_log": False},
    "server_cert": {"type": "str"},
    "timeout": {"type": "int", "default": 30},
}


class IncusError(Exception):
    """Base of everything that can go wrong with the daemon; str() is the whole message for a user."""

    def __init__(
        self,
        message: str,
        *,
        code: int | None = None,
        method: str | None = None,
        path: str | None = None,
        detail: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.method = method
        self.path = path
        self.detail = detail  # the daemon's own words
        self.status = status  # of the HTTP answer; `code` is what the daemon says in it


class IncusUnreachable(IncusError):
    """There is no daemon to talk to, or it went away."""


class IncusTimeout(IncusError):
    """The daemon did not answer, or an operation did not end, in time."""


class IncusForbidden(IncusError):
    """The socket or the server refuses this user."""


class IncusNotFound(IncusError):
    """404."""


class IncusConflict(IncusError):
    """409: it exists already, or something else is being done to it."""


class IncusPreconditionFailed(IncusError):
    """412: the object changed since its ETag was read."""


class IncusOperationFailed(IncusError):
    """The daemon accepted the request and failed to carry it out."""


_BY_STATUS: dict[int, type[IncusError]] = {
    401: IncusForbidden,
    403: IncusForbidden,
    404: IncusNotFound,
    409: IncusConflict,
    412: IncusPreconditionFailed,
    503: IncusUnreachable,
}


def default_socket(environ: Mapping[str, str] | None = None) -> str:
    """The socket that the incus command line would use."""
    env = os.environ if environ is None else environ
    if env.get("INCUS_SOCKET"):
        return env["INCUS_SOCKET"]
    if env.get("INCUS_DIR"):
        return os.path.join(env["INCUS_DIR"], "unix.socket")
    return next((path for path in DEFAULT_SOCKETS if os.path.exists(path)), DEFAULT_SOCKETS[0])


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a daemon listens: a local socket, or a URL with a client certificate."""

    socket: str | None = None
    url: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    server_cert: str | None = None

    @classmethod
    def from_params(cls, params: Mapping[str, t.Any]) -> Endpoint:
        """From the options of the doc fragment sottovoce.stack.incus (empty counts as unset)."""

        def text(name: str) -> str | None:
            value = params.get(name)
            return str(value) if value else None

        def file(name: str) -> str | None:
            value = text(name)
            return os.path.expanduser(value) if value else None

        url = text("remote_url")
        if not url:
            return cls(socket=file("socket"))
        if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
            raise IncusError(f"remote_url {url!r} is no address of an Incus server: write https://host:8443")
        cert, key = file("client_cert"), file("client_key")
        if cert is None and key is None:
            # What `incus remote add` made is good enough for us, too.
            folder = os.environ.get("INCUS_CONF") or os.path.expanduser("~/.config/incus")
            if os.path.exists(os.path.join(folder, "client.crt")):
                cert, key = os.path.join(folder, "client.crt"), os.path.join(folder, "client.key")
        server = text("server_cert")
        if server and not _FINGERPRINT.fullmatch(server):
            server = os.path.expanduser(server)
        return cls(url=url, client_cert=cert, client_key=key, server_cert=server)

    @property
    def path(self) -> str:
        """The socket's path (of the default socket if none was given)."""
        return self.socket or default_socket()

    @property
    def where(self) -> str:
        return self.url if self.url else self.path


@dataclasses.dataclass
class Response:
    status: int
    metadata: t.Any
    etag: str | None = None
    operation: str | None = None


@dataclasses.dataclass
class FileInfo:
    """What the files API says of a path; `entries` only for a directory."""

    type: str
    uid: int
    gid: int
    mode: int
    entries: list[str] | None = None


_FINGERPRINT = re.compile(r"[0-9A-Fa-f]{64}")


class TimedSocket:
    """A socket whose every wait ends at a deadline (or, in a transfer, after a stall).

    http.client only knows a timeout per system call: a peer that trickles would outlive any of them.
    """

    def __init__(self, sock: socket.socket, clock: Callable[[], float]) -> None:
        self.sock = sock
        self._clock = clock
        self._deadline = math.inf
        self._stall = math.inf

    def limit(self, *, deadline: float = math.inf, stall: float = math.inf) -> None:
        self._deadline, self._stall = deadline, stall

    def _arm(self) -> None:
        left = min(self._deadline - self._clock(), self._stall)
        if left <= 0:
            raise TimeoutError("timed out")
        self.sock.settimeout(None if left == math.inf else left)

    def sendall(self, data: t.Any) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            self._arm()
            self.sock.sendall(view[start : start + BLOCK])

    def makefile(self, mode: str, *_args: t.Any, **_kwargs: t.Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self, self.sock.makefile("rb", buffering=0)), 1 << 16)

    def settimeout(self, value: float | None) -> None:
        self.sock.settimeout(value)

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: TimedSocket, raw: t.Any) -> None:
        self._timed = timed
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: t.Any) -> int | None:
        self._timed._arm()
        return t.cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def _tls_context(endpoint: Endpoint) -> ssl.SSLContext:
    import ssl

    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if endpoint.server_cert:
        # Incus servers sign their own certificate: it is compared as a whole after the handshake.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if endpoint.client_cert:
        try:
            context.load_cert_chain(endpoint.client_cert, endpoint.client_key)
        except (OSError, ssl.SSLError) as exc:
            raise IncusError(
                f"Cannot use the client certificate {endpoint.client_cert} with the key"
                f" {endpoint.client_key or endpoint.client_cert}: {exc}. Give client_cert and client_key as"
                " PEM files that belong together."
            ) from exc
    return context


def _pinned_digest(server_cert: str) -> str:
    if _FINGERPRINT.fullmatch(server_cert):
        return server_cert.lower()
    import ssl

    try:
        with open(server_cert, encoding="ascii") as handle:
            return hashlib.sha256(ssl.PEM_cert_to_DER_cert(handle.read().strip())).hexdigest()
    except (OSError, ValueError) as exc:
        raise IncusError(
            f"Cannot read the server certificate {server_cert}: {exc}. server_cert is a PEM file, or the"
            " SHA-256 fingerprint that `incus info` shows."
        ) from exc


def open_socket(
    endpoint: Endpoint, timeout: float, *, clock: Callable[[], float] = time.monotonic
) -> socket.socket:
    """A connected socket (after the TLS handshake, if any); the errors say what to do."""
    deadline = clock() + timeout
    if endpoint.url:
        return _open_remote(endpoint, endpoint.url, timeout)
    return _open_local(endpoint, deadline, clock)


def _open_local(endpoint: Endpoint, deadline: float, clock: Callable[[], float]) -> socket.socket:
    path = endpoint.path
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        while True:
            sock.settimeout(max(deadline - clock(), 0.001))
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                # The queue of the listening socket is full (many clients at once).
                if clock() >= deadline:
                    raise TimeoutError("its queue is full") from None
                time.sleep(0.01)
    except (FileNotFoundError, NotADirectoryError) as exc:
        sock.close()
        raise IncusUnreachable(
            f"Incus is not running or not installed: there is no socket {path}. Start it (systemctl start"
            " incus, or service incus start), install it, or point `socket` (or INCUS_SOCKET, INCUS_DIR) at"
            " the right one.",
            path=path,
        ) from exc
    except PermissionError as exc:
        sock.close()
        raise IncusForbidden(
            f"This user may not use Incus: permission denied on {path}. Add the user to the group"
            " incus-admin (then log in again), or run as root.",
            path=path,
        ) from exc
    except TimeoutError as exc:
        sock.close()
        raise IncusTimeout(
            f"Incus does not accept connections on {path} ({exc}). Look at its journal"
            " (journalctl -u incus).",
            path=path,
        ) from exc
    except OSError as exc:
        sock.close()
        why = (
            "nothing listens there, the daemon is down"
            if exc.errno == errno.ECONNREFUSED
            else exc.strerror or str(exc)
        )
        raise IncusUnreachable(
            f"Cannot connect to Incus on {path}: {why}. Start it (systemctl start incus, or service incus"
            " start) or correct `socket`.",
            path=path,
        ) from exc
    except BaseException:
        sock.close()
        raise


def _open_remote(endpoint: Endpoint, url: str, timeout: float) -> socket.socket:
    import ssl

    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 8443
    context = _tls_context(endpoint)
    pinned = _pinned_digest(endpoint.server_cert) if endpoint.server_cert else None
    try:
        raw = socket.create_connection((host, port), timeout)
    except TimeoutError as exc:
        raise IncusTimeout(
            f"{url} did not answer within {timeout:g} s. Check the address, the firewall, and"
            " core.https_address on that server."
        ) from exc
    except OSError as exc:
        raise IncusUnreachable(
            f"Cannot connect to {url}: {exc.strerror or exc}. Check the address, and core.https_address on"
            " that server."
        ) from exc
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        tls = context.wrap_socket(raw, server_hostname=host)
    except ssl.SSLCertVerificationError as exc:
        raw.close()
        raise IncusForbidden(
            f"The certificate of {url} is not trusted: {exc.verify_message}. Give it as server_cert"
            " (a PEM file, or the SHA-256 fingerprint that `incus info` on the server shows)."
        ) from exc
    except TimeoutError as exc:
        raw.close()
        raise IncusTimeout(f"{url} did not finish the TLS handshake within {timeout:g} s.") from exc
    except OSError as exc:
        raw.close()
        raise IncusUnreachable(f"The TLS handshake with {url} failed: {exc}.") from exc
    if pinned is not None:
        seen = hashlib.sha256(tls.getpeercert(binary_form=True) or b"").hexdigest()
        if seen != pinned:
            tls.close()
            raise IncusForbidden(
                f"{url} shows another certificate than the pinned one: fingerprint {seen}, expected"
                f" {pinned} ({endpoint.server_cert}). Either that is not your server, or its certificate was"
                " renewed: then correct server_cert."
            )
    return tls


class _Connection(http.client.HTTPConnection):
    """http.client over whatever open_socket() gives."""

    def __init__(self, endpoint: Endpoint, clock: Callable[[], float]) -> None:
        host = (urlsplit(endpoint.url).netloc or "incus") if endpoint.url else "incus"
        super().__init__(host, blocksize=BLOCK)
        self._endpoint = endpoint
        self._clock = clock
        self.timed: TimedSocket | None = None
        # A forked child must not talk over its parent's connection.
        self.owner = os.getpid()
        self.used = False

    def opened(self, timeout: float) -> TimedSocket:
        """The socket, connected now if it was not."""
        if self.timed is None or self.sock is None:
            self.timed = TimedSocket(open_socket(self._endpoint, timeout, clock=self._clock), self._clock)
            self.sock = self.timed
        return self.timed

    def connect(self) -> None:
        # http.client would open a new connection after a "Connection: close"; ours is opened above.
        raise http.client.NotConnected

    def stale(self) -> bool:
        """Whether the other side closed this idle connection (then it is readable)."""
        if self.timed is None or self.sock is None or self.timed.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self.timed.fileno(), select.POLLIN)
        return bool(poll.poll(0))


class IncusClient:
    """Talks to one daemon over one kept connection. Not thread safe; `clone()` for another thread."""

    def __init__(
        self,
        endpoint: Endpoint | None = None,
        *,
        timeout: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint or Endpoint()
        self.timeout = timeout
        self.requests = 0
        self._clock = clock
        self._connection: _Connection | None = None
        self._server: dict[str, t.Any] | None = None

    def __enter__(self) -> IncusClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if connection.owner != os.getpid() and connection.timed is not None:
            # Only our copy of the descriptor: a TLS goodbye would end the parent's session.
            if connection.timed.fileno() >= 0:
                os.close(connection.timed.sock.detach())
            return
        connection.close()

    def clone(self) -> IncusClient:
        """Another client of the same daemon, for another thread; knows the server's facts already."""
        twin = IncusClient(self.endpoint, timeout=self.timeout, clock=self._clock)
        twin._server = self._server
        return twin

    # requests

    def get(
        self, path: str, *, project: str | None = None, query: Mapping[str, t.Any] | None = None
    ) -> Response:
        return self.request("GET", path, project=project, query=query)

    def request(
        self,
        method: str,
        path: str,
        *,
        project: str | None = None,
        query: Mapping[str, t.Any] | None = None,
        body: Body = None,
        etag: str | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """One request, answered as a whole within `timeout` seconds."""
        send = dict(headers or {})
        data: bytes | None = None
        if isinstance(body, bytes):
            data = body
        elif body is not None:
            data = json.dumps(body).encode()
            send.setdefault("Content-Type", "application/json")
        if etag:
            send["If-Match"] = etag
        limit = self.timeout if timeout is None else timeout
        with self._exchange(method, _target(path, project, query), data, send, limit) as answer:
            return self._read(method, path, answer)

    def run(
        self,
        method: str,
        path: str,
        *,
        project: str | None = None,
        query: Mapping[str, t.Any] | None = None,
        body: Body = None,
        etag: str | None = None,
        timeout: float | None = None,
        wait_timeout: float = 300.0,
    ) -> t.Any:
        """A request and, if the daemon works on it in the background, the wait for its end.

        Gives the operation's metadata; None if the operation had vanished (then look at the object).
        """
        response = self.request(
            method, path, project=project, query=query, body=body, etag=etag, timeout=timeout
        )
        if response.operation is None:
            return response.metadata
        return self.wait(response.operation, wait_timeout, what=f"{method} {path}")

    def wait(self, operation: str, timeout: float = 300.0, *, what: str | None = None) -> t.Any:
        """Wait for the end of a background operation; None if the daemon has forgotten it already."""
        path, _unused, tail = operation.partition("?")
        query = dict(pair.partition("=")[::2] for pair in tail.split("&") if pair)
        deadline = self._clock() + timeout
        what = what or operation
        while True:
            left = deadline - self._clock()
            if left <= 0:
                raise IncusTimeout(
                    f"{what} is still running in Incus after {timeout:g} s (operation {path}). Look at it"
                    " with `incus operation list`; a longer timeout may be all it needs.",
                    path=path,
                )
            slice_ = max(1, math.ceil(min(left, WAIT_SLICE)))
            try:
                try:
                    answer = self.request(
                        "GET",
                        f"{path}/wait",
                        query={**query, "timeout": slice_},
                        timeout=slice_ + self.timeout,
                    )
                except IncusError as exc:
                    if exc.detail != _WAIT_OVER:
                        raise
                    # The wait was over, or the operation failed with these words: ask.
                    answer = self.get(path, query=query)
            except IncusError as exc:
                if exc.status == 404:
                    return None
                failure = operation_failure(exc, what, path)
                if failure is None:
                    raise
                raise failure from None
            finished, metadata = operation_result(answer.metadata, what, path)
            if finished:
                return metadata

    def server(self) -> dict[str, t.Any]:
        """GET /1.0, once."""
        if self._server is None:
            self._server = t.cast("dict[str, t.Any]", self.get("/1.0").metadata)
        return self._server

    def has(self, extension: str) -> bool:
        """Whether the server has this API extension."""
        return extension in (self.server().get("api_extensions") or ())

    # raw data

    def upload(
        self,
        method: str,
        path: str,
        source: bytes | t.BinaryIO,
        *,
        length: int | None = None,
        project: str | None = None,
        query: Mapping[str, t.Any] | None = None,
        headers: Mapping[str, str] | None = None,
        stall: float = 60.0,
    ) -> Response:
        """Send raw data (an image, a file) in bounded memory; fails after `stall` seconds of standstill."""
        send = {"Content-Type": "application/octet-stream", **(headers or {})}
        if isinstance(source, bytes):
            length = len(source)
        elif length is None:
            length = os.fstat(source.fileno()).st_size - source.tell()
        send["Content-Length"] = str(length)
        target = _target(path, project, query)
        data: t.Any = source if isinstance(source, bytes) else _Exactly(source, length)
        with self._exchange(method, target, data, send, stall, stalls=True) as answer:
            return self._read(method, path, answer)

    def download(
        self,
        path: str,
        sink: t.BinaryIO,
        *,
        project: str | None = None,
        query: Mapping[str, t.Any] | None = None,
        stall: float = 60.0,
    ) -> Mapping[str, str]:
        """Write the raw answer of a GET to `sink` in bounded memory; gives its headers."""
        with self._exchange("GET", _target(path, project, query), None, {}, stall, stalls=True) as answer:
            if answer.status >= 400:
                self._read("GET", path, answer)
            _copy(answer, sink)
            return dict(answer.headers.items())

    def file_get(
        self, instance: str, path: str, sink: t.BinaryIO, *, project: str | None = None, stall: float = 60.0
    ) -> FileInfo:
        """A file of an instance into `sink`; of a directory, its entries."""
        api = f"/1.0/instances/{quote(instance, safe='')}/files"
        target = _target(api, project, {"path": path})
        with self._exchange("GET", target, None, {}, stall, stalls=True) as answer:
            if answer.status >= 400:
                self._read("GET", f"{api} ({path})", answer)
            info = FileInfo(
                type=answer.getheader("X-Incus-type") or "file",
                uid=int(answer.getheader("X-Incus-uid") or 0),
                gid=int(answer.getheader("X-Incus-gid") or 0),
                mode=int(answer.getheader("X-Incus-mode") or "0", 8),
            )
            if info.type == "directory":
                info.entries = list(json.loads(answer.read() or b"{}").get("metadata") or ())
                return info
            _copy(answer, sink)
            return info

    def file_put(
        self,
        instance: str,
        path: str,
        source: bytes | t.BinaryIO = b"",
        *,
        project: str | None = None,
        uid: int = 0,
        gid: int = 0,
        mode: int = 0o644,
        kind: str = "file",
        stall: float = 60.0,
    ) -> None:
        """Write a file, or make a directory (`kind="directory"`) or a link (`source` is its target).

        Incus 6.0 leaves the owner and mode of a file that exists as they are.
        """
        self.upload(
            "POST",
            f"/1.0/instances/{quote(instance, safe='')}/files",
            source,
            project=project,
            query={"path": path},
            headers={
                "X-Incus-type": kind,
                "X-Incus-write": "overwrite",
                "X-Incus-uid": str(uid),
                "X-Incus-gid": str(gid),
                "X-Incus-mode": f"{mode:04o}",
            },
            stall=stall,
        )

    def upgrade(self, operation: str, secret: str, *, timeout: float | None = None) -> WebSocket:
        """A websocket of an operation, on a connection of its own."""
        return self.upgrade_all(operation, [secret], timeout=timeout)[0]

    def upgrade_all(
        self, operation: str, secrets: list[str], *, timeout: float | None = None
    ) -> list[WebSocket]:
        """Several websockets of one operation; the handshakes overlap."""
        from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_websocket

        limit = self.timeout if timeout is None else timeout
        path, _unused, tail = operation.partition("?")
        opened: list[WebSocket] = []
        deadline = self._clock() + limit
        try:
            for secret in secrets:
                self.requests += 1
                left = max(deadline - self._clock(), 0.001)
                sock = open_socket(self.endpoint, left, clock=self._clock)
                target = f"{path}/websocket?{tail + '&' if tail else ''}secret={quote(secret, safe='')}"
                opened.append(_incus_websocket.WebSocket(sock, target, host=self._host(), clock=self._clock))
            for websocket in opened:
                websocket.handshake(deadline)
        except BaseException as exc:
            for websocket in opened:
                websocket.abort()
            if isinstance(exc, TimeoutError):
                raise IncusTimeout(
                    f"Incus on {self.endpoint.where} did not open the streams of {path} within {limit:g} s.",
                    path=path,
                ) from exc
            if isinstance(exc, _incus_websocket.WebSocketError):
                kind = IncusNotFound if exc.status == 404 else IncusUnreachable
                raise kind(
                    f"Incus on {self.endpoint.where} did not open the streams of {path}: {exc}",
                    path=path,
                    code=exc.status,
                ) from exc
            if isinstance(exc, OSError):
                raise IncusUnreachable(
                    f"The connection to Incus on {self.endpoint.where} broke: {exc}", path=path
                ) from exc
            raise
        return opened

    def start(
        self,
        method: str,
        path: str,
        *,
        project: str | None = None,
        query: Mapping[str, t.Any] | None = None,
        timeout: float | None = None,
    ) -> PendingRequest:
        """Send a request and come back: its answer is read later, when `fileno()` becomes readable."""
        limit = self.timeout if timeout is None else timeout
        connection = self._idle()
        deadline = self._clock() + limit
        self.requests += 1
        try:
            timed = connection.opened(limit)
            timed.limit(deadline=deadline)
            self._send(connection, method, _target(path, project, query), None, {})
        except IncusError:
            self.close()
            raise
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            raise self._broken(exc, method, path, limit) from exc
        self._connection = None
        return PendingRequest(self, connection, timed, method, path)

    # inner

    def _host(self) -> str:
        return (urlsplit(self.endpoint.url).netloc if self.endpoint.url else "") or "incus"

    def _idle(self) -> _Connection:
        """The kept connection if it is good, else a new one."""
        connection = self._connection
        if connection is None or connection.owner != os.getpid() or connection.stale():
            self.close()
            connection = self._connection = _Connection(self.endpoint, self._clock)
        return connection

    @staticmethod
    def _send(
        connection: _Connection, method: str, target: str, body: t.Any, headers: Mapping[str, str]
    ) -> None:
        connection.request(method, target, body=body, headers={"User-Agent": USER_AGENT, **headers})

    def _exchange(
        self,
        method: str,
        target: str,
        body: t.Any,
        headers: Mapping[str, str],
        limit: float,
        *,
        stalls: bool = False,
    ) -> _Answer:
        """The exchange as a context: inside it the answer is read, after it the connection is kept."""
        for again in (False, True):
            connection = self._idle()
            kept = connection.used
            deadline = self._clock() + limit
            self.requests += 1
            try:
                timed = connection.opened(limit)
                if stalls:
                    timed.limit(stall=limit)
                else:
                    timed.limit(deadline=deadline)
                try:
                    self._send(connection, method, target, body, headers)
                except (BrokenPipeError, ConnectionResetError):
                    # A refused upload: the reason was sent before the connection was closed.
                    if not stalls or body is None:
                        raise
                answer = connection.getresponse()
            except IncusError:
                self.close()
                raise
            except (OSError, http.client.HTTPException) as exc:
                self.close()
                # A kept connection may have been closed under our feet. Only a request that
                # changes nothing may be sent a second time.
                if kept and method == "GET" and not again and not isinstance(exc, TimeoutError):
                    continue
                raise self._broken(exc, method, target, limit) from exc
            except BaseException:
                self.close()
                raise
            connection.used = True
            return _Answer(self, method, target, limit, answer)
        raise AssertionError("unreachable")

    def _broken(self, exc: BaseException, method: str, target: str, limit: float) -> IncusError:
        path = target.partition("?")[0]
        if isinstance(exc, TimeoutError):
            return IncusTimeout(
                f"Incus on {self.endpoint.where} did not answer {method} {path} within {limit:g} s. If it is"
                " only slow, raise `timeout`; else look at its journal (journalctl -u incus).",
                method=method,
                path=path,
            )
        return IncusUnreachable(
            f"The connection to Incus on {self.endpoint.where} broke during {method} {path}:"
            f" {str(exc) or type(exc).__name__}. The daemon may be restarting; run again.",
            method=method,
            path=path,
        )

    def _read(self, method: str, path: str, answer: http.client.HTTPResponse) -> Response:
        raw = answer.read()
        try:
            document = json.loads(raw) if raw else {}
            if not isinstance(document, dict):
                raise ValueError("no object")
        except ValueError:
            excerpt = raw[:200].decode("utf-8", "replace")
            raise IncusError(
                f"{self.endpoint.where} gave no Incus answer to {method} {path} (HTTP {answer.status}):"
                f" {excerpt!r}. Is it an Incus server?",
                code=answer.status,
                method=method,
                path=path,
            ) from None
        if answer.status >= 400 or document.get("type") == "error":
            code = int(document.get("error_code") or answer.status)
            text = str(document.get("error") or answer.reason)
            raise self._refused(code, text, method, path, answer.status)
        operation = document.get("operation") or None
        return Response(
            status=int(document.get("status_code") or answer.status),
            metadata=document.get("metadata"),
            etag=answer.getheader("ETag"),
            operation=str(operation) if operation else None,
        )

    def _refused(self, code: int, text: str, method: str, path: str, status: int) -> IncusError:
        kind = _BY_STATUS.get(code, IncusError)
        message = f"Incus refused {method} {path}: {text} (HTTP {code})"
        if kind is IncusForbidden and self.endpoint.url:
            message += (
                f". The server {self.endpoint.url} does not let this client certificate"
                f" ({self.endpoint.client_cert or 'none given'}) do that: on the server, run"
                " `incus config trust add-certificate`, or correct client_cert and client_key."
            )
        elif kind is IncusForbidden:
            message += ". Add the user to the group incus-admin (then log in again), or run as root."
        elif kind is IncusPreconditionFailed:
            message += ". Somebody else changed it at the same moment: run again."
        elif kind is IncusUnreachable:
            message += ". The daemon is starting or stopping: run again in a moment."
        return kind(message, code=code, method=method, path=path, detail=text, status=status)


class _Answer:
    """The answer of an exchange, as a context that keeps or drops the connection afterwards."""

    def __init__(
        self, client: IncusClient, method: str, target: str, limit: float, answer: http.client.HTTPResponse
    ) -> None:
        self._client, self._method, self._target, self._limit = client, method, target, limit
        self._answer = answer

    def __enter__(self) -> http.client.HTTPResponse:
        return self._answer

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            if not self._answer.isclosed():
                self._answer.read()
            return
        if self._answer.isclosed() and isinstance(value, IncusError):
            return  # refused, but read to its end: the connection is fine
        self._client.close()
        self._answer.close()
        if isinstance(value, (OSError, http.client.HTTPException)) and not _local_error(value):
            raise self._client._broken(value, self._method, self._target, self._limit) from value


def _copy(answer: http.client.HTTPResponse, sink: t.BinaryIO) -> None:
    while block := answer.read(BLOCK):
        sink.write(block)
    if answer.length:
        # http.client keeps quiet about an answer that is shorter than announced.
        raise http.client.IncompleteRead(b"", answer.length)


def _local_error(exc: BaseException) -> bool:
    """Errors of the local file that is being read or written are not the daemon's."""
    return isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class PendingRequest:
    """A request under way, see IncusClient.start(): call `poll()` whenever `fileno()` is readable."""

    def __init__(
        self, client: IncusClient, connection: _Connection, timed: TimedSocket, method: str, path: str
    ) -> None:
        self._client, self._connection, self._timed = client, connection, timed
        self._method, self._path = method, path
        self._seen = bytearray()
        self._over = False
        timed.sock.setblocking(False)

    def fileno(self) -> int:
        return self._timed.fileno()

    def poll(self) -> Response | None:
        """The answer once it is there as a whole. (Incus sends the head of a wait at its beginning.)"""
        try:
            ended = self._receive()
            answer = self._parse(ended)
        except (OSError, http.client.HTTPException) as exc:
            self.cancel()
            raise self._client._broken(exc, self._method, self._path, self._client.timeout) from exc
        if answer is None:
            return None
        self._keep(answer)
        return self._client._read(self._method, self._path, answer)

    def _receive(self) -> bool:
        while True:
            try:
                block = self._timed.sock.recv(1 << 16)
            except OSError as exc:
                # By name: ssl is only imported when a remote is used.
                if isinstance(exc, (BlockingIOError, InterruptedError)) or type(exc).__name__ in (
                    "SSLWantReadError",
                    "SSLWantWriteError",
                ):
                    return False
                raise
            if not block:
                return True
            self._seen += block

    def _parse(self, ended: bool) -> http.client.HTTPResponse | None:
        if b"\r\n\r\n" in self._seen:
            answer = _parsed(bytes(self._seen), self._method)
            try:
                body = answer.read()
            except http.client.IncompleteRead:
                body = None
            if body is not None:
                # Read once to see that it is whole; the caller reads it again.
                return _parsed(bytes(self._seen), self._method)
        if ended:
            raise http.client.RemoteDisconnected("the daemon closed the connection")
        return None

    def _keep(self, answer: http.client.HTTPResponse) -> None:
        client = self._client
        if client._connection is not None or answer.will_close:
            self.cancel()
            return
        self._over = True
        idle = _Connection(client.endpoint, client._clock)
        idle.timed = idle.sock = self._timed
        idle.owner, idle.used = self._connection.owner, True
        client._connection = idle

    def cancel(self) -> None:
        """Give up waiting; nothing if the answer has come."""
        if not self._over:
            self._over = True
            self._connection.close()


class _Recorded:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_args: t.Any, **_kwargs: t.Any) -> io.BytesIO:
        return io.BytesIO(self._data)


def _parsed(data: bytes, method: str) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(t.cast("socket.socket", _Recorded(data)), method=method)
    answer.begin()
    return answer


class _Exactly:
    """A file-like body that gives exactly as many bytes as were announced, or fails."""

    def __init__(self, source: t.BinaryIO, length: int) -> None:
        self._source, self._left = source, length

    def read(self, size: int = BLOCK) -> bytes:
        if self._left <= 0:
            return b""
        block = self._source.read(min(size if size > 0 else BLOCK, self._left))
        if not block:
            raise IncusError(f"The file being sent became {self._left} bytes shorter while it was read.")
        self._left -= len(block)
        return block

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read():
            yield block


def operation_failure(exc: IncusError, what: str, path: str) -> IncusOperationFailed | None:
    """What a wait's error says of the operation; None if it is about the request itself.

    Incus sends the head of the answer when a wait begins, so a failed operation is an error
    document under HTTP 200.
    """
    if exc.status != 200 or exc.detail is None:
        return None
    return IncusOperationFailed(
        f"Incus could not carry out {what}: {exc.detail}", code=exc.code, path=path, detail=exc.detail
    )


def operation_result(answer: t.Any, what: str, path: str) -> tuple[bool, t.Any]:
    """(finished, metadata) from an operation as the daemon shows it; a failed one raises."""
    if not isinstance(answer, Mapping):
        raise IncusError(f"Incus described the operation of {what} in a way not understood: {answer!r}")
    code = int(answer.get("status_code") or 0)
    if code == 200:
        return True, answer.get("metadata") or {}
    if code >= 400:
        text = str(answer.get("err") or "")
        if code == 401 and not text:
            text = "it was cancelled"
        raise IncusOperationFailed(
            f"Incus could not carry out {what}: {text or 'no reason given'}",
            code=code,
            path=path,
            detail=text,
        )
    return False, None


def _target(path: str, project: str | None, query: Mapping[str, t.Any] | None) -> str:
    pairs: dict[str, t.Any] = {}
    if project:
        pairs["project"] = project
    for name, value in (query or {}).items():
        if value is not None:
            pairs[name] = str(value).lower() if isinstance(value, bool) else value
    if not pairs:
        return path
    return f"{path}{'&' if '?' in path else '?'}{urlencode(pairs)}"
