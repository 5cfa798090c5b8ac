"""What is stored of jobs, and the rules of webhooks: no server, no engine."""

from __future__ import annotations

import ipaddress
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from voicegate import errors, webhook_rules
from voicegate.errors import ApiError, SettingsError
from voicegate.jobs import Live, decide, position
from voicegate.settings import Settings
from voicegate.store import (
    JobConflict,
    Message,
    QuotaFull,
    Record,
    Store,
    StoreError,
    TooManyJobs,
    new_id,
)
from voicegate.webhook_rules import Allowed, check_url, forbidden, secrets_from, signature
from voicegate.webhooks import _afterwards

MIB = 1024 * 1024
MESSAGE = Message("job.done", "http://receiver/", b"{}")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "data")
    yield store
    store.close()


def add(store: Store, now: float, audio: bytes = b"sound", **more: Any) -> str:
    id = new_id(now)
    source = os.memfd_create("audio")
    os.write(source, audio)
    os.lseek(source, 0, os.SEEK_SET)
    fingerprint = store.save_audio(id, source)
    values = {
        "now": now, "due": now, "size": len(audio), "webhook_url": None, "key": None,
        "fingerprint": fingerprint, "limit": 100, "quota": MIB,
    } | more  # fmt: skip
    store.insert(id, {"options": {}}, **values)
    return id


def run(store: Store, now: float, **more: Any) -> Record:
    """The next job, done."""
    record = store.start_next(now)
    assert record is not None
    assert store.finish(record, "done", now=now, quota=MIB, segments=[{"text": "x"}], **more)
    return record


def test_from_queued_to_done(store: Store) -> None:
    id = add(store, 10.0)
    assert store.audio(id).read_bytes() == b"sound"
    assert store.audio(id).stat().st_mode & 0o777 == 0o600
    record = store.start_next(11.0)
    assert record is not None
    assert (record.id, record.status, record.runs, record.started) == (id, "running", 1, 11.0)
    assert store.start_next(11.0) is None
    assert store.finish(record, "done", now=12.0, quota=MIB, info={"a": 1}, segments=[{"text": "ü"}])
    found = store.get(id)
    assert found is not None
    assert (found.status, found.finished, found.info, found.error) == ("done", 12.0, {"a": 1}, None)
    assert store.segments(id) == [{"text": "ü"}]
    assert not store.audio(id).exists()
    # It has one end only.
    assert not store.finish(record, "failed", now=13.0, quota=MIB)
    assert not store.cancel(id, now=13.0, message=None)
    assert store.counts() == {"queued": 0, "running": 0, "done": 1, "failed": 0, "cancelled": 0}


def test_what_ran_is_queued_again_after_a_crash(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = add(store, 1.0), add(store, 2.0)
    assert store.start_next(3.0)
    (tmp_path / "audio" / "job_orphan").write_bytes(b"of a request that was never answered")
    store.close()
    store = Store(tmp_path)
    assert store.recover() == 1
    assert sorted(path.name for path in (tmp_path / "audio").iterdir()) == [first, second]
    record = store.start_next(4.0)
    assert record is not None
    assert (record.id, record.runs) == (first, 2)
    # The run before it must not end it.
    old = Record(**{**vars(record), "runs": 1})
    assert not store.finish(old, "done", now=5.0, quota=MIB)
    assert store.finish(record, "done", now=5.0, quota=MIB)
    store.close()


def test_cancelled_while_it_runs(store: Store) -> None:
    id = add(store, 1.0, webhook_url="http://receiver/")
    record = store.start_next(2.0)
    assert record is not None
    assert store.cancel(id, now=3.0, message=MESSAGE)
    assert not store.finish(record, "done", now=4.0, quota=MIB, segments=[{"text": "x"}])
    store.put_back(id, not_before=0, failed=True)
    found = store.get(id)
    assert found is not None
    assert (found.status, store.segments(id)) == ("cancelled", [])
    assert len(store.deliveries(id)) == 1
    assert store.start_next(9.0) is None


def test_order_and_pauses(store: Store) -> None:
    normal = add(store, 100.0)
    low = add(store, 101.0, due=101.0 + 3600)
    high = add(store, 102.0, due=102.0 - 3600)
    late = add(store, 5000.0)  # a job that waited for an hour goes before it, whatever its priority
    order = []
    for _unused in range(4):
        record = store.start_next(6000.0)
        assert record is not None
        order.append(record.id)
    assert order == [high, normal, low, late]
    store.put_back(high, not_before=7000.0, failed=True)
    assert store.start_next(6999.0) is None
    assert store.next_start() == 7000.0
    again = store.start_next(7000.0)
    assert again is not None
    assert (again.id, again.failures, again.runs) == (high, 1, 2)


def test_limit_and_quota(store: Store) -> None:
    first = add(store, 1.0, b"x" * 600_000)
    with pytest.raises(TooManyJobs):
        add(store, 2.0, limit=1)
    with pytest.raises(QuotaFull) as caught:  # a job that waits is never removed
        add(store, 2.0, b"x" * 600_000)
    assert caught.value.used == 600_000
    run(store, 3.0)
    second = add(store, 4.0, b"x" * 600_000)
    assert store.get(first) is not None
    # Finished ones make room for audio, the oldest first, if nobody is still to be told of them.
    run(store, 5.0)
    third = add(store, 6.0, webhook_url="http://receiver/")
    run(store, 7.0, message=MESSAGE)
    add(store, 8.0, b"x" * (MIB - 32))
    assert store.get(first) is None
    assert store.get(second) is not None
    add(store, 9.0, b"x" * 15)
    assert store.get(second) is None
    assert store.segments(second) == []
    with pytest.raises(QuotaFull):
        add(store, 9.0, b"x" * 10)
    assert store.get(third) is not None


def test_retention(store: Store) -> None:
    old = add(store, 1.0)
    run(store, 2.0)
    waiting = add(store, 3.0, webhook_url="http://receiver/")
    run(store, 4.0, message=MESSAGE)
    new = add(store, 5.0)
    run(store, 100.0)
    unfinished = add(store, 6.0)
    assert store.expire(50.0) == 1
    assert [record.id for record in store.page()] == [unfinished, new, waiting]
    assert store.get(old) is None
    [delivery] = store.due_deliveries(200.0)
    store.attempted(delivery.id, "failed", at=1.0, seconds=0.5, status=500, error="x", next=None)
    assert store.expire(50.0) == 1
    assert store.deliveries(waiting) == []


def test_idempotency_key(store: Store) -> None:
    id = add(store, 1.0, key="k")
    fingerprint = store._database.execute("SELECT fingerprint FROM jobs").fetchone()[0]
    found = store.find_by_key("k", fingerprint)
    assert found is not None
    assert found.id == id
    assert store.find_by_key("other", fingerprint) is None
    with pytest.raises(JobConflict):
        store.find_by_key("k", "another request")


def test_pages(store: Store) -> None:
    ids = [add(store, float(second)) for second in range(10)]
    run(store, 20.0)
    assert [record.id for record in store.page(limit=3)] == ids[:-4:-1]
    assert [record.id for record in store.page(limit=3, cursor=ids[7])] == ids[6:3:-1]
    assert [record.id for record in store.page(limit=2, cursor=ids[7], ascending=True)] == ids[8:]
    assert [record.id for record in store.page(statuses=["done"])] == [ids[0]]
    assert [record.id for record in store.page(created_after=2, created_before=4)] == [ids[3], ids[2]]
    # A page goes on where the last one ended, although its last job is gone.
    store._database.execute("DELETE FROM jobs WHERE id = ?", (ids[7],))
    assert [record.id for record in store.page(limit=2, cursor=ids[7])] == [ids[6], ids[5]]


def test_deliveries(store: Store) -> None:
    id = add(store, 1.0, webhook_url="http://receiver/")
    run(store, 2.0, message=MESSAGE)
    [delivery] = store.due_deliveries(2.0)
    assert (delivery.id, delivery.body, delivery.attempts) == (id.replace("job_", "msg_"), b"{}", ())
    store.attempted(delivery.id, "pending", at=2.0, seconds=0.5, status=None, error="slow", next=3.5)
    assert store.due_deliveries(3.0) == []
    assert store.next_delivery(3.0) == 3.5
    [delivery] = store.due_deliveries(3.5)
    assert delivery.attempts == ({"at": 2.0, "seconds": 0.5, "status": None, "error": "slow"},)
    store.attempted(delivery.id, "delivered", at=3.5, seconds=0.1, status=204, error=None, next=None)
    assert store.next_delivery(0.0) is None
    [delivery] = store.deliveries(id)
    assert (delivery.state, len(delivery.attempts)) == ("delivered", 2)


def test_every_commit_is_synchronised(store: Store) -> None:
    pragma = {
        name: store._database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys")
    }
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_audio_is_synchronised_before_its_job_is_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, insert = os.fsync, store.insert

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def watched_insert(*args: Any, **kwargs: Any) -> None:
        calls.append("insert")
        insert(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(store, "insert", watched_insert)
    id = add(store, 1.0)
    assert calls == [id, "audio", "insert"]


def test_a_commit_that_fails_leaves_no_transaction_behind(store: Store) -> None:
    """As on a full disk: the next one finds the database as it was."""
    id = add(store, 1.0)
    [[pages]] = store._database.execute("PRAGMA page_count").fetchall()
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    record = store.start_next(2.0)
    assert record is not None
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.finish(record, "done", now=3.0, quota=MIB, segments=[{"text": "x" * 100_000}])
    found = store.get(id)
    assert found is not None
    assert found.status == "running"
    store._database.execute("PRAGMA max_page_count = 100000")
    assert store.finish(record, "done", now=3.0, quota=MIB, segments=[{"text": "x" * 100_000}])


# -- files that cannot be used


def test_one_server_for_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="in use by another voicegate"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").write_bytes(b"no database at all, whatever its name is" * 100)
    with pytest.raises(StoreError, match=r"cannot be read .*move it away"):
        Store(tmp_path)
    (tmp_path / "jobs.sqlite3").unlink()
    store = Store(tmp_path)  # and the lock was given back
    for second in range(50):
        add(store, float(second))
    store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    content = bytearray((tmp_path / "jobs.sqlite3").read_bytes())
    for page in range(2, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    (tmp_path / "jobs.sqlite3").write_bytes(content)
    with pytest.raises(StoreError, match="cannot be read"):
        Store(tmp_path)


def test_file_of_another_version(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store._database.execute("UPDATE schema SET version = 2")
    store.close()
    with pytest.raises(StoreError, match="schema 2, this one knows 1"):
        Store(tmp_path)
    for statement in ("DELETE FROM schema", "DROP TABLE schema"):
        database = sqlite3.connect(tmp_path / "jobs.sqlite3", isolation_level=None)
        database.execute(statement)
        database.close()
        with pytest.raises(StoreError, match="is not a database of voicegate"):
            Store(tmp_path)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot use .*file/data: Not a directory"):
        Store(tmp_path / "file" / "data")


# -- decisions


@pytest.mark.parametrize(
    ("error", "failures", "decision"),
    [
        (errors.bad_audio("x"), 0, "fail"),
        (errors.only_english("x"), 0, "fail"),
        (errors.engine_down(), 0, "again"),
        (errors.engine_down(), 1, "again"),
        (errors.engine_down(), 2, "fail"),
        (errors.out_of_memory(), 2, "fail"),
        (errors.internal(), 0, "again"),
        (errors.load_failed(), 99, "wait"),
        (errors.queue_full(1, 1), 99, "wait"),
        (errors.unavailable("The server is shutting down.", "shutting_down"), 0, "wait"),
        (ApiError(503, "the engine's address does not answer", code="engine_unreachable"), 99, "wait"),
        (ApiError(504, "the engine did not answer in time", code="engine_timeout"), 1, "again"),
        (ApiError(504, "the engine did not answer in time", code="engine_timeout"), 2, "fail"),
    ],
)
def test_what_becomes_of_a_job(error: ApiError, failures: int, decision: str) -> None:
    assert decide(error, failures) == decision


@pytest.mark.parametrize(
    ("seen", "known"),
    [("2.15", (2, 15)), ("", (0, 0)), ("2.end", (0, 0)), ("x.1", (0, 0)), ("1", (0, 0)), ("²." * 9, (0, 0))],
)
def test_position_in_a_stream(seen: str, known: tuple[int, int]) -> None:
    assert position(seen) == known


def test_progress_is_100_only_when_stored() -> None:
    record: Any = None
    live = Live(record)
    assert live.progress == 0.0
    live.segments.append({"end": 5.0})
    assert live.progress == 0.0
    from voicegate.engine import Info

    live.info = Info("transcribe", "en", 10.0, 8.0)
    assert live.progress == 50.0
    live.segments.append({"end": 10.5})
    assert live.progress == 99.0


# -- webhooks


def test_signature_is_that_of_standard_webhooks() -> None:
    """The example of its reference implementations."""
    found = signature(
        secrets_from("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
        "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}',
    )  # fmt: skip
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_secrets() -> None:
    two = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n\n whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n"
    assert len(secrets_from(two)) == 2
    assert signature(secrets_from(two), "m", 1, b"").count("v1,") == 2
    for bad in (
        "",
        "\n",
        "whsec_",
        "whsec_c2hvcnQ=",
        "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "whsec_" + "A" * 200,
    ):
        with pytest.raises(ValueError, match="openssl rand -base64 32"):
            secrets_from(bad)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:7f00:1", "loopback"),
        ("::127.0.0.1", "loopback"),
        ("64:ff9b::127.0.0.1", "loopback"),
        ("2002:7f00:0001::", "loopback"),
        ("0.0.0.0", "unspecified"),  # noqa: S104
        ("::", "unspecified"),
        ("0.0.0.1", "reserved"),
        ("169.254.169.254", "link-local"),
        ("::ffff:169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "reserved"),
        ("100.100.100.200", "reserved"),
        ("fd00:ec2::254", "reserved"),
        ("192.168.1.2", None),
        ("::ffff:10.0.0.1", None),
        ("fd12::1", None),
        ("8.8.8.8", None),
        ("2606:4700::1111", None),
    ],
)
def test_addresses(address: str, kind: str | None) -> None:
    assert forbidden(ipaddress.ip_address(address)) == kind


def test_allowed_addresses() -> None:
    allowed = Allowed.parse("127.0.0.1, fe80::/10 nas.lan,169.254.1.7/16")
    for address in ("127.0.0.1", "::ffff:127.0.0.1", "fe80::5", "169.254.9.9"):
        assert allowed.refusal("x", ipaddress.ip_address(address)) is None
    assert allowed.refusal("x", ipaddress.ip_address("127.0.0.2")) == "loopback addresses are not called"
    assert allowed.refusal("NAS.lan.", ipaddress.ip_address("127.0.0.2")) is None
    for bad in ("300.1.1.1", "a/b", "10.0.0.0/99", "http://x"):
        with pytest.raises(ValueError, match="neither a network, an address nor a host name"):
            Allowed.parse(bad)


@pytest.mark.parametrize(
    "url",
    ["", "ftp://a/", "//a/", "http://", "http:///x", "https://user:pw@a/", "http://a:99999/", "http://a:0/",
     "http://[::1/", "http://a b/", "http://ä/", "http://a/" + "x" * 2048, "http://a/\nHost:b"],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # some texts are the parser's own
        check_url(url)


def test_urls() -> None:
    for url in (
        "https://hooks.example.org/a?b=c",
        "http://192.168.1.5:8123/api/webhook/x",
        "http://[fd12::1]/",
    ):
        check_url(url)


def test_attempts_end() -> None:
    pauses = [_afterwards(500, tried)[1] for tried in range(1, 7)]
    assert pauses == [*webhook_rules.PAUSES, None]
    assert _afterwards(None, 1) == ("pending", 1.0)
    assert _afterwards(302, 6) == ("failed", None)
    assert _afterwards(410, 1) == ("failed", None)
    assert _afterwards(204, 3) == ("delivered", None)


def test_settings_of_webhooks(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password\n")
    with pytest.raises(SettingsError) as caught:
        Settings.load({"model": "tiny", "webhook_secret_file": str(secret), "webhook_allow": "1.2.3"}, {})
    first, second = caught.value.problems
    assert first.startswith("--webhook-secret-file: line 1 is not whsec_")
    assert "password" not in first
    assert second.startswith("--webhook-allow: '1.2.3' is neither")
