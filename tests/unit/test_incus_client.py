# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import threading
import time
import typing as t
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_client as client_module
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    Endpoint,
    IncusClient,
    IncusConflict,
    IncusError,
    IncusForbidden,
    IncusNotFound,
    IncusOperationFailed,
    IncusPreconditionFailed,
    IncusTimeout,
    IncusUnreachable,
    default_socket,
    operation_result,
)
from fake_incus import Answer, FakeIncus, Request, ended, error, started, sync


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeIncus]:
    fake = FakeIncus(tmp_path)
    yield fake
    fake.close()


@pytest.fixture
def client(daemon: FakeIncus) -> Iterator[IncusClient]:
    with IncusClient(Endpoint(socket=daemon.socket), timeout=5) as it:
        yield it


def test_many_requests_use_one_connection(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0/projects", sync(["default"], headers={"ETag": "abc"}))
    for _unused in range(10):
        answer = client.get("/1.0/projects")
    assert answer.metadata == ["default"]
    assert answer.etag == "abc"
    assert answer.operation is None
    assert (client.requests, daemon.connections) == (10, 1)


def test_project_query_body_and_etag_are_sent(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("PUT", "/1.0/instances/a", sync({}))
    client.request(
        "PUT",
        "/1.0/instances/a",
        project="ai tools",
        query={"recursion": 1, "all": True, "none": None},
        body={"x": "ü"},
        etag="e1",
    )
    seen = daemon.log[-1]
    assert seen.query == {"project": "ai tools", "recursion": "1", "all": "true"}
    assert seen.json == {"x": "ü"}
    assert seen.headers["if-match"] == "e1"
    assert seen.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, IncusError),
        (403, IncusForbidden),
        (404, IncusNotFound),
        (409, IncusConflict),
        (412, IncusPreconditionFailed),
        (503, IncusUnreachable),
    ],
)
def test_errors_have_types_and_say_what_where_why(
    daemon: FakeIncus, client: IncusClient, code: int, kind: type[IncusError]
) -> None:
    daemon.route("GET", "/1.0/networks", error(code, "because of this"))
    with pytest.raises(kind) as caught:
        client.get("/1.0/networks")
    assert caught.type is kind
    assert caught.value.code == code
    assert (caught.value.method, caught.value.path) == ("GET", "/1.0/networks")
    assert "GET /1.0/networks" in str(caught.value)
    assert "because of this" in str(caught.value)
    # The connection is still good.
    with pytest.raises(kind):
        client.get("/1.0/networks")
    assert daemon.connections == 1


def test_something_else_than_incus_is_named(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0", Answer(raw=b"<html>hello</html>"))
    with pytest.raises(IncusError, match=r"no Incus answer.*<html>hello"):
        client.get("/1.0")


def test_a_connection_closed_while_idle_is_opened_again_for_any_method(
    daemon: FakeIncus, client: IncusClient
) -> None:
    daemon.route("GET", "/1.0/projects", sync([]))
    daemon.route("POST", "/1.0/projects", sync({}))
    client.get("/1.0/projects")
    daemon.drop_connections()
    time.sleep(0.05)
    client.request("POST", "/1.0/projects", body={})
    assert daemon.connections == 2
    assert [request.method for request in daemon.log] == ["GET", "POST"]


@pytest.mark.parametrize(("method", "times"), [("GET", 2), ("POST", 1)])
def test_only_a_get_is_sent_again_when_a_kept_connection_breaks(
    daemon: FakeIncus, client: IncusClient, method: str, times: int
) -> None:
    daemon.route("GET", "/1.0/projects", sync([]))
    daemon.route(method, "/1.0/x", Answer(vanish=True))
    client.get("/1.0/projects")
    with pytest.raises(IncusUnreachable, match="broke during"):
        client.request(method, "/1.0/x")
    assert sum(request.path == "/1.0/x" for request in daemon.log) == times


def test_a_get_on_a_new_connection_is_not_repeated(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0/x", Answer(vanish=True))
    with pytest.raises(IncusUnreachable):
        client.get("/1.0/x")
    assert len(daemon.log) == 1


def test_connection_close_is_honoured(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0/x", sync(1, close=True))
    assert client.get("/1.0/x").metadata == 1
    assert client.get("/1.0/x").metadata == 1
    assert daemon.connections == 2


def test_no_answer_is_a_timeout(daemon: FakeIncus) -> None:
    gate = threading.Event()

    def hang(_request: Request) -> Answer:
        gate.wait(10)
        return sync(1)

    daemon.route("GET", "/1.0/x", hang)
    begin = time.monotonic()
    with (
        IncusClient(Endpoint(socket=daemon.socket), timeout=0.2) as client,
        pytest.raises(IncusTimeout) as caught,
    ):
        client.get("/1.0/x")
    gate.set()
    assert time.monotonic() - begin < 2
    assert "within 0.2 s" in str(caught.value)


def test_a_trickling_answer_is_a_timeout(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def trickle() -> None:
            sock, _unused = listener.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while not stop.wait(0.05):
                    try:
                        sock.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        with IncusClient(Endpoint(socket=path), timeout=0.4) as client, pytest.raises(IncusTimeout):
            client.get("/1.0")
        stop.set()
        thread.join(5)


def test_missing_socket(tmp_path: Path) -> None:
    client = IncusClient(Endpoint(socket=str(tmp_path / "none")))
    with pytest.raises(IncusUnreachable, match=r"not running or not installed.*none.*Start it"):
        client.get("/1.0")


def test_dead_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "dead")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    with pytest.raises(IncusUnreachable, match="daemon is down"):
        IncusClient(Endpoint(socket=path)).get("/1.0")


@pytest.mark.skipif(os.geteuid() != 0, reason="changes to another user, which needs root")
def test_forbidden_socket(daemon: FakeIncus) -> None:
    os.chmod(daemon.socket, stat.S_IRWXU)
    script = (
        "import os, sys\n"
        f"sys.path[:0] = {os.sys.path!r}\n"  # type: ignore[attr-defined]
        "from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_client as c\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        f"    c.IncusClient(c.Endpoint(socket={daemon.socket!r})).get('/1.0')\n"
        "except c.IncusForbidden as exc:\n"
        "    print(exc)\n"
    )
    for folder in Path(daemon.socket).parents:
        if folder != Path("/") and folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    done = subprocess.run(
        [os.sys.executable, "-c", script],  # type: ignore[attr-defined]
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert "Add the user to the group incus-admin" in done.stdout, done.stderr


def test_run_waits_for_the_operation(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("POST", "/1.0/instances", started("/1.0/operations/1"))
    daemon.route("GET", "/1.0/operations/1/wait", ended({"return": 3}))
    assert client.run("POST", "/1.0/instances", body={}) == {"return": 3}
    assert client.requests == 2


def test_run_of_something_immediate(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("POST", "/1.0/profiles", sync(None))
    assert client.run("POST", "/1.0/profiles", body={}) is None


def test_a_vanished_operation_is_none(daemon: FakeIncus, client: IncusClient) -> None:
    assert client.wait("/1.0/operations/1") is None


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "no such device", status=200),  # 6.0: an error document below a head sent before
        sync({"status_code": 400, "err": "no such device"}),
    ],
)
def test_a_failed_operation_tells_the_daemons_reason(
    daemon: FakeIncus, client: IncusClient, answer: Answer
) -> None:
    daemon.route("POST", "/1.0/instances", started("/1.0/operations/1"))
    daemon.route("GET", "/1.0/operations/1/wait", answer)
    with pytest.raises(IncusOperationFailed, match=r"POST /1.0/instances: no such device") as caught:
        client.run("POST", "/1.0/instances", body={})
    assert caught.value.detail == "no such device"


def test_an_operation_that_failed_with_404_has_not_vanished(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0/operations/1/wait", error(404, "image not found", status=200))
    with pytest.raises(IncusOperationFailed, match="image not found"):
        client.wait("/1.0/operations/1")


def test_wait_goes_on_while_the_operation_runs_and_ends_at_its_deadline(
    daemon: FakeIncus,
) -> None:
    now = 0.0

    def waited(request: Request) -> Answer:
        nonlocal now
        now += float(request.query["timeout"])
        return error(500, "context deadline exceeded", status=200)

    daemon.route("GET", "/1.0/operations/1/wait", waited)
    daemon.route("GET", "/1.0/operations/1", sync({"status_code": 103}))
    with (
        IncusClient(Endpoint(socket=daemon.socket), clock=lambda: now) as client,
        pytest.raises(IncusTimeout, match="still running in Incus after 150 s"),
    ):
        client.wait("/1.0/operations/1", 150)
    waits = [request.query["timeout"] for request in daemon.log if request.path.endswith("/wait")]
    assert waits == ["60", "60", "30"]


def test_an_operation_whose_own_reason_is_a_timeout(daemon: FakeIncus, client: IncusClient) -> None:
    text = "context deadline exceeded"
    daemon.route("GET", "/1.0/operations/1/wait", error(500, text, status=200))
    daemon.route("GET", "/1.0/operations/1", sync({"status_code": 400, "err": text}))
    with pytest.raises(IncusOperationFailed, match=text):
        client.wait("/1.0/operations/1", 150)


def test_wait_keeps_the_operations_own_query(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0/operations/1/wait", ended())
    client.wait("/1.0/operations/1?project=x", 5)
    assert daemon.log[-1].query == {"project": "x", "timeout": "5"}


@pytest.mark.parametrize("code", [103, 105])
def test_operation_still_running(code: int) -> None:
    assert operation_result({"status_code": code}, "x", "/p") == (False, None)


def test_server_is_asked_once_and_known_to_clones(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0", sync({"api_extensions": ["projects"]}))
    assert client.has("projects")
    assert not client.has("time_travel")
    with client.clone() as twin:
        assert twin.has("projects")
    assert len(daemon.log) == 1


def test_a_clone_has_its_own_connection(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0/x", sync(1))
    client.get("/1.0/x")
    with client.clone() as twin:
        twin.get("/1.0/x")
    assert daemon.connections == 2
    assert client.get("/1.0/x").metadata == 1


def test_a_forked_child_opens_its_own_connection(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0/x", sync(1))
    client.get("/1.0/x")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if client.get("/1.0/x").metadata == 1 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.get("/1.0/x").metadata == 1
    assert daemon.connections == 2


def test_upload_streams_a_file_with_its_length(
    daemon: FakeIncus, client: IncusClient, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_000))
    daemon.route("POST", "/1.0/instances/a/files", sync({}))
    with source.open("rb") as handle:
        client.file_put("a", "/root/x y", handle, mode=0o600, uid=7, project="p")
    seen = daemon.log[-1]
    assert seen.body == source.read_bytes()
    assert seen.query == {"path": "/root/x y", "project": "p"}
    assert (seen.headers["x-incus-mode"], seen.headers["x-incus-uid"]) == ("0600", "7")
    assert "transfer-encoding" not in seen.headers


def test_download_of_a_file_and_of_a_folder(daemon: FakeIncus, client: IncusClient) -> None:
    data = os.urandom(2_000_000)
    meta = {"X-Incus-type": "file", "X-Incus-uid": "1", "X-Incus-gid": "2", "X-Incus-mode": "0640"}
    daemon.route("GET", "/1.0/instances/a/files", Answer(raw=data, headers=meta))
    sink = io.BytesIO()
    info = client.file_get("a", "/x", sink)
    assert sink.getvalue() == data
    assert (info.type, info.uid, info.gid, info.mode) == ("file", 1, 2, 0o640)
    daemon.route("GET", "/1.0/instances/a/files", sync(["b", "c"], headers={"X-Incus-type": "directory"}))
    assert client.file_get("a", "/", sink).entries == ["b", "c"]
    daemon.route("GET", "/1.0/instances/a/files", error(404, "no such file"))
    with pytest.raises(IncusNotFound, match="no such file"):
        client.file_get("a", "/y", sink)


def test_an_error_of_the_local_sink_is_not_the_daemons(daemon: FakeIncus, client: IncusClient) -> None:
    class Full(io.BytesIO):
        def write(self, _data: t.Any) -> int:
            raise OSError(28, "No space left on device")

    daemon.route("GET", "/1.0/x", Answer(raw=b"data"))
    with pytest.raises(OSError, match="No space left"):
        client.download("/1.0/x", Full())


def test_a_truncated_download_fails(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0/x", Answer(raw=b"data", headers={"Content-Length": "400"}, close=True))
    with pytest.raises(IncusUnreachable):
        client.download("/1.0/x", io.BytesIO())


def test_start_reads_an_answer_that_comes_in_pieces(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    go = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            sock, _unused = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                go.wait(5)
                sock.sendall(b'1f\r\n{"type":"sync","metadata":"ab"}')
                time.sleep(0.05)
                sock.sendall(b"\r\n0\r\n\r\n")
                time.sleep(0.3)

        threading.Thread(target=serve, daemon=True).start()
        with IncusClient(Endpoint(socket=path), timeout=5) as client:
            pending = client.start("GET", "/1.0/operations/1/wait")
            time.sleep(0.1)
            assert pending.poll() is None
            go.set()
            deadline = time.monotonic() + 5
            while (answer := pending.poll()) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert answer is not None
            assert answer.metadata == "ab"


def test_start_notices_that_the_daemon_went_away(daemon: FakeIncus, client: IncusClient) -> None:
    daemon.route("GET", "/1.0/x", Answer(vanish=True))
    pending = client.start("GET", "/1.0/x")
    time.sleep(0.1)
    with pytest.raises(IncusUnreachable, match="closed the connection"):
        pending.poll()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"INCUS_SOCKET": "/a/s", "INCUS_DIR": "/b"}, "/a/s"),
        ({"INCUS_DIR": "/b"}, "/b/unix.socket"),
    ],
)
def test_default_socket_from_the_environment(environ: dict[str, str], expected: str) -> None:
    assert default_socket(environ) == expected


def test_default_socket_that_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = str(tmp_path / "1"), str(tmp_path / "2")
    monkeypatch.setattr(client_module, "DEFAULT_SOCKETS", (first, second))
    assert default_socket({}) == first
    Path(second).touch()
    assert default_socket({}) == second


def test_endpoint_from_params(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Endpoint.from_params({"socket": "", "remote_url": None}) == Endpoint()
    assert Endpoint.from_params({"socket": "~/s"}).socket == os.path.expanduser("~/s")
    monkeypatch.setenv("INCUS_CONF", str(tmp_path))
    assert Endpoint.from_params({"remote_url": "https://h:8443"}).client_cert is None
    (tmp_path / "client.crt").touch()
    assert Endpoint.from_params({"remote_url": "https://h"}).client_key == str(tmp_path / "client.key")
    for wrong in ("h:8443", "http://h:8443", "https://"):
        with pytest.raises(IncusError, match="write https://host:8443"):
            Endpoint.from_params({"remote_url": wrong})


def _certificate(folder: Path, name: str) -> tuple[str, str]:
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return str(cert), str(key)


@pytest.fixture
def remote(tmp_path: Path, daemon: FakeIncus) -> Iterator[tuple[str, dict[str, str]]]:
    """The fake daemon behind TLS that asks for a client certificate."""
    import ssl

    server, server_key = _certificate(tmp_path, "server")
    client, client_key = _certificate(tmp_path, "client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server, server_key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(client)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                raw, _unused = listener.accept()
                sock = context.wrap_socket(raw, server_side=True)
            except ssl.SSLError:
                continue
            except OSError:
                return
            threading.Thread(target=daemon._serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield (
        f"https://127.0.0.1:{listener.getsockname()[1]}",
        {"client_cert": client, "client_key": client_key, "server_cert": server},
    )
    listener.close()


def test_remote_with_certificates(daemon: FakeIncus, remote: tuple[str, dict[str, str]]) -> None:
    url, certs = remote
    daemon.route("GET", "/1.0/projects", sync(["default"]))
    with IncusClient(Endpoint(url=url, **certs), timeout=5) as client:
        assert client.get("/1.0/projects").metadata == ["default"]
        assert client.get("/1.0/projects").metadata == ["default"]


def test_remote_pinned_by_fingerprint(daemon: FakeIncus, remote: tuple[str, dict[str, str]]) -> None:
    url, certs = remote
    shown = subprocess.run(
        ["openssl", "x509", "-in", certs["server_cert"], "-noout", "-fingerprint", "-sha256"],
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    ).stdout
    certs["server_cert"] = shown.strip().partition("=")[2].replace(":", "")
    daemon.route("GET", "/1.0/projects", sync([]))
    with IncusClient(Endpoint(url=url, **certs), timeout=5) as client:
        assert client.get("/1.0/projects").metadata == []


def test_remote_with_another_certificate_is_refused_before_anything_is_sent(
    daemon: FakeIncus, remote: tuple[str, dict[str, str]]
) -> None:
    url, certs = remote
    certs["server_cert"] = certs["client_cert"]
    with pytest.raises(IncusForbidden, match="another certificate than the pinned one"):
        IncusClient(Endpoint(url=url, **certs), timeout=5).get("/1.0")
    assert daemon.log == []


def test_remote_that_signs_itself_needs_its_certificate(remote: tuple[str, dict[str, str]]) -> None:
    url, certs = remote
    del certs["server_cert"]
    with pytest.raises(IncusForbidden, match=r"is not trusted.*server_cert"):
        IncusClient(Endpoint(url=url, **certs), timeout=5).get("/1.0")


def test_remote_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(IncusUnreachable, match=r"core.https_address"):
        IncusClient(Endpoint(url=f"https://127.0.0.1:{port}"), timeout=2).get("/1.0")
