"""Webhooks to real receivers on loopback: those that fail, hang, redirect, or must not be called."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.server
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from voicegate import webhooks
from voicegate.store import Delivery, Message, Store, new_id
from voicegate.webhook_rules import Allowed, secrets_from
from voicegate.webhooks import Webhooks
from voicegate_support import CLIPS, Call, Receiver, Server

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
CLIP = CLIPS / "D009.wav"

Serve = Callable[..., Server]


def signed(call: Call) -> bool:
    """As a receiver checks it."""
    content = f"{call.headers['webhook-id']}.{call.headers['webhook-timestamp']}.".encode() + call.body
    digest = hmac.new(bytes(range(32)), content, hashlib.sha256).digest()
    recent = abs(time.time() - int(call.headers["webhook-timestamp"])) < 60
    return recent and call.headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


# -- the calls, without a server


def deliver(folder: Path, url: str, allow: str = "127.0.0.1", secrets: str = SECRET) -> Delivery:
    """One webhook, until it was taken or given up."""

    async def work() -> Delivery:
        store = Store(folder)

        async def stored(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        id = new_id(1.0)
        store.insert(
            id, {}, now=1.0, due=1.0, size=0, webhook_url=url, key=None, fingerprint="", limit=9, quota=9
        )
        store.cancel(id, now=1.0, message=Message("job.cancelled", url, b'{"type":"job.cancelled"}'))
        hooks = Webhooks(store, stored, secrets_from(secrets) if secrets else (), Allowed.parse(allow))
        working = asyncio.create_task(hooks.work())
        try:
            async with asyncio.timeout(20):
                while (delivery := store.deliveries(id)[0]).state == "pending":
                    await asyncio.sleep(0.01)
                return delivery
        finally:
            working.cancel()
            await asyncio.wait({working})
            store.close()

    return asyncio.run(work())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses themselves are tested where they are decided (test_attempts_end)."""
    monkeypatch.setattr(webhooks, "PAUSES", (0.01, 0.02, 0.03, 0.04, 0.05))
    monkeypatch.setattr(webhooks, "TIMEOUT", 0.5)


def statuses(delivery: Delivery) -> list[int | None]:
    return [attempt["status"] for attempt in delivery.attempts]


def test_taken_at_once(tmp_path: Path, quick: None) -> None:
    receiver = Receiver()
    delivery = deliver(tmp_path, f"{receiver.url}/hook?a=b%20c")
    [call] = receiver.calls
    assert (delivery.state, statuses(delivery), delivery.attempts[0]["error"]) == ("delivered", [204], None)
    assert (call.path, call.body) == ("/hook?a=b%20c", b'{"type":"job.cancelled"}')
    assert (call.headers["content-type"], call.headers["host"]) == ("application/json", receiver.url[7:])
    assert call.headers["webhook-id"] == delivery.id
    assert signed(call)
    receiver.close()


def test_500_five_times(tmp_path: Path, quick: None) -> None:
    receiver = Receiver(500, 500, 500, 500, 500, 200)
    delivery = deliver(tmp_path, receiver.url)
    assert (delivery.state, statuses(delivery)) == ("delivered", [500] * 5 + [200])
    assert len({(call.headers["webhook-id"], call.body) for call in receiver.calls}) == 1
    assert all(signed(call) for call in receiver.calls)
    at = [attempt["at"] for attempt in delivery.attempts]
    assert at == sorted(at)
    receiver.close()


def test_given_up_after_six(tmp_path: Path, quick: None) -> None:
    receiver = Receiver(*[503] * 9)
    assert (deliver(tmp_path, receiver.url).state, len(receiver.calls)) == ("failed", 6)
    receiver.close()


def test_gone_means_gone(tmp_path: Path, quick: None) -> None:
    receiver = Receiver(410)
    assert statuses(deliver(tmp_path, receiver.url)) == [410]
    receiver.close()


def test_redirects_are_not_followed(tmp_path: Path, quick: None) -> None:
    target = Receiver()

    def redirect(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("Location", target.url)
        handler.end_headers()

    receiver = Receiver(redirect)
    delivery = deliver(tmp_path, receiver.url)
    assert statuses(delivery) == [307, 204]
    assert delivery.attempts[0]["error"] == "redirects are not followed"
    assert target.calls == []
    receiver.close()
    target.close()


def test_hanging_and_endless_answers(tmp_path: Path, quick: None) -> None:
    released = threading.Event()
    sent = []

    def hang(handler: http.server.BaseHTTPRequestHandler) -> None:
        released.wait(10)

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        """A byte of the header now and then, so that no single read takes long."""
        while not released.wait(0.1):
            handler.wfile.write(b"X")

    def flood(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _number in range(100_000):
                handler.wfile.write(b"x" * 65536)
                sent.append(65536)
        except OSError:
            handler.close_connection = True

    receiver = Receiver(hang, drip, flood)
    delivery = deliver(tmp_path, receiver.url)
    released.set()
    assert (delivery.state, statuses(delivery)) == ("delivered", [None, None, 200])
    assert {attempt["error"] for attempt in delivery.attempts} == {"no answer within 0.5 s", None}
    assert sum(sent) < 50_000_000  # what fits into the buffers of the system, and not 6 GB
    receiver.close()


def test_nobody_there(tmp_path: Path, quick: None) -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        delivery = deliver(tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}/")
    assert (delivery.state, statuses(delivery)) == ("failed", [None] * 6)
    assert all(attempt["error"] for attempt in delivery.attempts)
    delivery = deliver(tmp_path / "b", "http://nowhere.invalid/")
    assert "name cannot be resolved" in delivery.attempts[0]["error"]


def test_a_secret_that_was_taken_away_is_told(tmp_path: Path, quick: None) -> None:
    delivery = deliver(tmp_path, "http://127.0.0.1:9/", secrets="")
    assert (delivery.state, delivery.attempts[0]["error"]) == (
        "failed", "the server has no webhook secret any more",
    )  # fmt: skip


# Every way to write an address that leads back to this machine.
LOOPBACK = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "127.0.0.1.", "0.0.0.0",  # noqa: S104
    "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "localhost",
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_not_called(tmp_path: Path, quick: None, host: str) -> None:
    receiver = Receiver()
    delivery = deliver(tmp_path, f"http://{host}:{receiver.port}/", allow="")
    assert (delivery.state, statuses(delivery), receiver.calls) == ("failed", [None] * 6, [])
    error = delivery.attempts[0]["error"]
    assert error.startswith("the address is refused") or "cannot be resolved" in error
    receiver.close()


def test_a_name_is_resolved_once_and_its_address_is_checked(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that gives a good address first and a bad one afterwards leads nowhere."""
    good, bad = Receiver(address="127.0.0.2"), []
    asked: list[str] = []

    def rebinding(host: str, port: int, **_more: Any) -> list[Any]:
        asked.append(host)
        address = "127.0.0.2" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with socket.create_server(("127.0.0.1", good.port)) as other:
        other.settimeout(0.2)
        delivery = deliver(tmp_path, f"http://rebinding.example:{good.port}/", allow="127.0.0.2")
        with pytest.raises(TimeoutError):
            bad.append(other.accept())
    assert (delivery.state, asked, len(good.calls)) == ("delivered", ["rebinding.example"], 1)
    assert good.calls[0].headers["host"] == f"rebinding.example:{good.port}"
    good.close()


def test_certificates_are_checked_against_the_name(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=x",
         "-addext", "subjectAltName=DNS:receiver.example"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    receiver = Receiver(context=context)

    def resolve(host: str, port: int, **_more: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    untrusted = deliver(tmp_path / "a", f"https://receiver.example:{receiver.port}/")
    assert untrusted.state == "failed"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert deliver(tmp_path / "b", f"https://receiver.example:{receiver.port}/").state == "delivered"
    other = deliver(tmp_path / "c", f"https://other.example:{receiver.port}/")
    assert other.state == "failed"
    assert "certificate" in other.attempts[0]["error"].lower()
    assert len(receiver.calls) == 1
    receiver.close()


# -- through the routes


def post(server: Server, **fields: str) -> tuple[int, Any]:
    parts = [('name="audio"', CLIP.read_bytes())]
    parts += [(f'name="{name}"', value.encode()) for name, value in ({"language": "en"} | fields).items()]
    status, _headers, body = server.post("/jobs", parts)
    return status, json.loads(body)


def deliveries(server: Server, id: str, state: str) -> Any:
    deadline = time.monotonic() + 20
    while True:
        data = json.loads(server.request("GET", f"/jobs/{id}/deliveries")[2])["data"]
        if data and data[0]["state"] == state and (state != "pending" or data[0]["attempts"]):
            return data[0]
        assert time.monotonic() < deadline, data
        time.sleep(0.05)


def test_from_the_job_to_the_receiver(serve: Serve, tmp_path: Path) -> None:
    """With the real pauses, and a server that is killed in one of them."""
    (tmp_path / "secret").write_text(SECRET)
    options = ("--data-dir", str(tmp_path / "data"), "--webhook-secret-file", str(tmp_path / "secret"),
               "--webhook-allow", "127.0.0.0/8")  # fmt: skip
    server = serve(*options)
    receiver = Receiver(500, 500)
    id = post(server, webhook_url=f"{receiver.url}/hook")[1]["id"]
    delivery = deliveries(server, id, "pending")
    assert [attempt["status_code"] for attempt in delivery["attempts"]] == [500]
    assert 0.5 < delivery["next_attempt_at"] - delivery["attempts"][0]["at"] < 2
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(10)
    server = serve(*options, ready=False)
    server.wait_listening()
    delivery = deliveries(server, id, "delivered")
    assert [attempt["status_code"] for attempt in delivery["attempts"]] == [500, 500, 204]
    first, second = (attempt["at"] for attempt in delivery["attempts"][1:])
    assert 1.9 < second - first < 4
    assert delivery["next_attempt_at"] is None
    assert len({(call.headers["webhook-id"], call.body) for call in receiver.calls}) == 1
    assert all(signed(call) for call in receiver.calls)
    body = json.loads(receiver.calls[-1].body)
    job = json.loads(server.request("GET", f"/jobs/{id}")[2])
    del job["segments"]
    assert (body["type"], body["data"], delivery["body"]) == ("job.done", job, body)
    assert "/hook" not in server.log
    receiver.close()


def test_addresses_are_refused_with_the_request(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    server = serve("--data-dir", str(tmp_path / "data"), "--webhook-secret-file", str(tmp_path / "secret"),
                   ready=False)  # fmt: skip
    server.wait_listening()
    forbidden = [f"http://{host}/" for host in LOOPBACK if not host.endswith(".")]
    forbidden += [
        f"http://{host}/" for host in ("169.254.169.254", "[fe80::1]", "[ff02::1]", "100.100.100.200")
    ]
    forbidden += ["https://224.0.0.1/", "http://[64:ff9b::a9fe:a9fe]/latest/meta-data"]
    for url in forbidden:
        status, body = post(server, webhook_url=url)
        assert (status, body["error"]["code"]) == (400, "webhook_forbidden"), url
        assert "VOICEGATE_WEBHOOK_ALLOW" in body["error"]["message"]
    for url in ("ftp://a/", "http://user:pw@a/", "x"):
        assert post(server, webhook_url=url)[1]["error"]["param"] == "webhook_url"
    assert json.loads(server.request("GET", "/jobs")[2])["data"] == []
    assert not list((tmp_path / "data" / "audio").iterdir())
