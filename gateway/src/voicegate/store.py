"""Jobs on disk: one SQLite file, and a folder with the audio of those that are not finished.

What a call of `Store` has returned from survives a power cut: every change is one transaction in a
write-ahead log that is synchronised at each commit, and audio is synchronised before its job is inserted.
All calls that use the database are made by one thread (see `jobs`); nothing here knows of the event loop.

A job is queued, running, then done, failed or cancelled. Nothing but `finish` and `cancel` ends one, each
in a single transaction with the result and the webhook that goes with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from voicegate.errors import VoicegateError

JobStatus = Literal["queued", "running", "done", "failed", "cancelled"]
STATUSES: tuple[JobStatus, ...] = ("queued", "running", "done", "failed", "cancelled")
UNFINISHED: tuple[JobStatus, ...] = ("queued", "running")

SCHEMA = 1
_TABLES = (
    "CREATE TABLE schema (version INTEGER NOT NULL)",
    # `bytes`: of the audio while it is needed, then of the result. `due`: who is smaller goes first.
    """CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        status TEXT NOT NULL,
        request TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        due REAL NOT NULL,
        not_before REAL NOT NULL DEFAULT 0,
        runs INTEGER NOT NULL DEFAULT 0,
        failures INTEGER NOT NULL DEFAULT 0,
        created REAL NOT NULL,
        started REAL,
        finished REAL,
        info TEXT,
        error TEXT,
        webhook_url TEXT,
        idempotency_key TEXT UNIQUE,
        fingerprint TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX jobs_waiting ON jobs (due, id) WHERE status = 'queued'",
    "CREATE INDEX jobs_finished ON jobs (finished) WHERE finished IS NOT NULL",
    """CREATE TABLE results (
        job TEXT PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
        segments TEXT NOT NULL
    )""",
    # `next`: when the next attempt is due; NULL when there will be none.
    """CREATE TABLE deliveries (
        id TEXT PRIMARY KEY,
        job TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE,
        event TEXT NOT NULL,
        url TEXT NOT NULL,
        body BLOB NOT NULL,
        state TEXT NOT NULL DEFAULT 'pending',
        next REAL
    ) WITHOUT ROWID""",
    "CREATE INDEX deliveries_job ON deliveries (job)",
    "CREATE INDEX deliveries_next ON deliveries (next) WHERE next IS NOT NULL",
    """CREATE TABLE attempts (
        delivery TEXT NOT NULL REFERENCES deliveries ON DELETE CASCADE,
        number INTEGER NOT NULL,
        at REAL NOT NULL,
        seconds REAL NOT NULL,
        status INTEGER,
        error TEXT,
        PRIMARY KEY (delivery, number)
    ) WITHOUT ROWID""",
)
_COLUMNS = (
    "id, status, request, bytes, due, runs, failures, created, started, finished, info, error, webhook_url"
)


class StoreError(VoicegateError):
    """The folder cannot be used: what is wrong, and what to do about it."""


class JobConflict(Exception):
    """The idempotency key belongs to a job that asked for something else."""


class TooManyJobs(Exception):
    """As many jobs wait as may."""


class QuotaFull(Exception):
    """Not even without all finished jobs would there be room."""

    def __init__(self, used: int) -> None:
        super().__init__(f"{used} bytes are used")
        self.used = used


@dataclass(frozen=True)
class Record:
    """One job as it is stored; times in seconds since 1970."""

    id: str
    status: JobStatus
    request: dict[str, Any]
    bytes: int
    due: float
    runs: int
    failures: int
    created: float
    started: float | None
    finished: float | None
    info: dict[str, Any] | None
    error: dict[str, Any] | None
    webhook_url: str | None


@dataclass(frozen=True)
class Delivery:
    """A webhook that is to be called, and how often that was tried."""

    id: str
    job: str
    event: str
    url: str
    body: bytes
    state: str  # pending, delivered or failed
    next: float | None
    attempts: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Message:
    """The webhook that goes with the end of a job."""

    event: str
    url: str
    body: bytes


def new_id(now: float) -> str:
    """An id nobody can guess; ids sort by the time at which they were made."""
    return f"job_{int(now * 1000):012x}{secrets.token_hex(10)}"


class Store:
    def __init__(self, folder: Path) -> None:
        """Open or create what is in `folder`; StoreError if that cannot work."""
        self._audio = folder / "audio"
        self._file = folder / "jobs.sqlite3"
        try:
            new = not folder.exists()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._audio.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if new:
                _sync(folder.parent)
            _sync(folder)
        except OSError as error:
            raise StoreError(f"cannot use {folder}: {error.strerror or error}") from error
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreError(
                    f"{folder} is in use by another voicegate; give each a folder of its own"
                ) from error
            try:
                # Made here, since SQLite lets others read what it makes; its log gets the mode of the file.
                os.close(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                self._database = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False)
            except (OSError, sqlite3.DatabaseError) as error:
                raise StoreError(f"cannot open {self._file}: {error}") from error
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self.close()
            raise StoreError(
                f"{self._file} cannot be read ({error}); put a copy back,"
                " or move it away to start with an empty one"
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._database.close()
        os.close(self._lock)

    def _prepare(self) -> None:
        run = self._database.execute
        run("PRAGMA auto_vacuum = FULL")  # counts for a new file only
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("PRAGMA foreign_keys = ON")
        [[state]] = run("PRAGMA quick_check(1)").fetchall()
        if state != "ok":
            raise sqlite3.DatabaseError(state)
        tables = {name for (name,) in run("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not tables:
            with self._transaction():
                for statement in _TABLES:
                    run(statement)
                run("INSERT INTO schema VALUES (?)", (SCHEMA,))
            return
        versions = [version for (version,) in run("SELECT version FROM schema")] if "schema" in tables else []
        if len(versions) != 1 or not isinstance(versions[0], int):
            raise StoreError(
                f"{self._file} is not a database of voicegate; move it away, or use another folder"
            )
        if versions[0] != SCHEMA:
            raise StoreError(
                f"{self._file} was written by another version of voicegate (schema {versions[0]},"
                f" this one knows {SCHEMA}); install that version again, or move the file away"
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # some failures have rolled back already
                self._database.execute("ROLLBACK")
            raise

    # -- at start

    def recover(self) -> int:
        """Queue again what was running when the server ended; how many. Removes audio of no job."""
        with self._transaction():
            count = self._database.execute(
                "UPDATE jobs SET status = 'queued', not_before = 0 WHERE status = 'running'"
            ).rowcount
        wanted = {id for (id,) in self._database.execute("SELECT id FROM jobs WHERE finished IS NULL")}
        for path in self._audio.iterdir():
            if path.name not in wanted:
                path.unlink()
        return count

    # -- accepting

    def audio(self, id: str) -> Path:
        return self._audio / id

    def save_audio(self, id: str, source: int) -> str:
        """Copy an open file (which this closes) and synchronise it; its SHA-256. OSError if that fails."""
        digest = hashlib.sha256()
        try:
            with os.fdopen(source, "rb") as reader, _new_file(self.audio(id)) as writer:
                while block := reader.read(1024 * 1024):
                    digest.update(block)
                    writer.write(block)
                writer.flush()
                os.fsync(writer.fileno())
            _sync(self._audio)
        except BaseException:
            self.drop_audio(id)
            raise
        return digest.hexdigest()

    def drop_audio(self, id: str) -> None:
        self.audio(id).unlink(missing_ok=True)

    def check_room(self, size: int, *, limit: int, quota: int) -> None:
        """TooManyJobs or QuotaFull if a job with `size` bytes of audio could not be accepted."""
        [kept] = self._database.execute(
            f"SELECT coalesce(sum(bytes), 0) FROM jobs WHERE NOT ({_REMOVABLE})"  # noqa: S608
        ).fetchone()
        [waiting] = self._database.execute(
            "SELECT count(*) FROM jobs WHERE status IN ('queued', 'running')"
        ).fetchone()
        if waiting >= limit:
            raise TooManyJobs
        if kept + size > quota:
            raise QuotaFull(kept)

    def find_by_key(self, key: str, fingerprint: str) -> Record | None:
        """The job accepted under an idempotency key. JobConflict if it asked for something else."""
        row = self._database.execute(
            f"SELECT {_COLUMNS}, fingerprint FROM jobs WHERE idempotency_key = ?",  # noqa: S608
            (key,),
        ).fetchone()
        if row is None:
            return None
        if row[-1] != fingerprint:
            raise JobConflict
        return _record(row[:-1])

    def insert(
        self,
        id: str,
        request: dict[str, Any],
        *,
        now: float,
        due: float,
        size: int,
        webhook_url: str | None,
        key: str | None,
        fingerprint: str,
        limit: int,
        quota: int,
    ) -> None:
        """Accept a job whose audio is saved; finished ones make room if they must.

        TooManyJobs, QuotaFull: then nothing has changed.
        """
        with self._transaction():
            self.check_room(size, limit=limit, quota=quota)
            self._make_room(quota - size)
            self._database.execute(
                "INSERT INTO jobs (id, status, request, bytes, due, created, webhook_url, idempotency_key,"
                " fingerprint) VALUES (?, 'queued', ?, ?, ?, ?, ?, ?, ?)",
                (id, json.dumps(request), size, due, now, webhook_url, key, fingerprint),
            )

    # -- running

    def start_next(self, now: float) -> Record | None:
        """The job whose turn it is, now running; None if none can run now."""
        with self._transaction():
            row = self._database.execute(
                "SELECT id FROM jobs WHERE status = 'queued' AND not_before <= ? ORDER BY due, id LIMIT 1",
                (now,),
            ).fetchone()
            if row is None:
                return None
            self._database.execute(
                "UPDATE jobs SET status = 'running', started = ?, runs = runs + 1 WHERE id = ?", (now, row[0])
            )
        return self.get(row[0])

    def next_start(self) -> float | None:
        """When the first of the queued jobs may run; None if none is queued."""
        row = self._database.execute("SELECT min(not_before) FROM jobs WHERE status = 'queued'").fetchone()
        return None if row[0] is None else float(row[0])

    def put_back(self, id: str, *, not_before: float, failed: bool) -> None:
        """Queue a running job again, from `not_before` on; `failed` if that counts against it."""
        with self._transaction():
            self._database.execute(
                "UPDATE jobs SET status = 'queued', not_before = ?, failures = failures + ?"
                " WHERE id = ? AND status = 'running'",
                (not_before, int(failed), id),
            )

    def finish(
        self,
        record: Record,
        status: Literal["done", "failed"],
        *,
        now: float,
        quota: int,
        info: dict[str, Any] | None = None,
        segments: Sequence[dict[str, Any]] = (),
        error: dict[str, Any] | None = None,
        message: Message | None = None,
    ) -> bool:
        """The one end of a running job; False if it has another one already (it was cancelled)."""
        text = json.dumps(segments, ensure_ascii=False, separators=(",", ":"))
        with self._transaction():
            changed = self._database.execute(
                "UPDATE jobs SET status = ?, finished = ?, info = ?, error = ?, bytes = ?"
                " WHERE id = ? AND status = 'running' AND runs = ?",
                (status, now, _json(info), _json(error), len(text.encode()), record.id, record.runs),
            ).rowcount
            if not changed:
                return False
            if status == "done":
                self._database.execute("INSERT INTO results VALUES (?, ?)", (record.id, text))
            self._add_delivery(record.id, message, now)
            self._make_room(quota, keep=record.id)
        self.drop_audio(record.id)
        return True

    def cancel(self, id: str, *, now: float, message: Message | None) -> bool:
        """End a job that has no end yet; False if it has one."""
        with self._transaction():
            changed = self._database.execute(
                "UPDATE jobs SET status = 'cancelled', finished = ?, bytes = 0"
                " WHERE id = ? AND status IN ('queued', 'running')",
                (now, id),
            ).rowcount
            if changed:
                self._add_delivery(id, message, now)
        if changed:
            self.drop_audio(id)
        return bool(changed)

    # -- looking

    def get(self, id: str) -> Record | None:
        row = self._database.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (id,)).fetchone()  # noqa: S608
        return None if row is None else _record(row)

    def segments(self, id: str) -> list[dict[str, Any]]:
        """Of a job that is done; empty for others."""
        row = self._database.execute("SELECT segments FROM results WHERE job = ?", (id,)).fetchone()
        return [] if row is None else list(json.loads(row[0]))

    def page(
        self,
        *,
        statuses: Sequence[str] = (),
        created_after: float | None = None,
        created_before: float | None = None,
        cursor: str | None = None,
        ascending: bool = False,
        limit: int = 20,
    ) -> list[Record]:
        """At most `limit` jobs beyond `cursor` (an id, also of a job that is gone), the newest first."""
        conditions = ["1"]
        values: list[Any] = []
        if statuses:
            conditions.append(f"status IN ({','.join('?' * len(statuses))})")
            values += statuses
        for value, condition in (
            (created_after, "created >= ?"),
            (created_before, "created < ?"),
            (cursor, "id > ?" if ascending else "id < ?"),
        ):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        rows = self._database.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE {' AND '.join(conditions)}"  # noqa: S608
            f" ORDER BY id {'ASC' if ascending else 'DESC'} LIMIT ?",
            (*values, limit),
        )
        return [_record(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many jobs there are in each status."""
        found: dict[str, int] = dict.fromkeys(STATUSES, 0)
        found.update(self._database.execute("SELECT status, count(*) FROM jobs GROUP BY status"))
        return found

    # -- removing

    def expire(self, before: float) -> int:
        """Remove what was finished before that time; how many jobs."""
        with self._transaction():
            return self._database.execute(
                f"DELETE FROM jobs WHERE finished < ? AND {_REMOVABLE}",  # noqa: S608
                (before,),
            ).rowcount

    def _make_room(self, quota: int, keep: str = "") -> None:
        """Remove finished jobs, the oldest first, until all take `quota` bytes or none is left to remove."""
        [used] = self._database.execute("SELECT coalesce(sum(bytes), 0) FROM jobs").fetchone()
        if used <= quota:
            return
        for id, size in self._database.execute(
            f"SELECT id, bytes FROM jobs WHERE {_REMOVABLE} AND id != ? ORDER BY finished, id",  # noqa: S608
            (keep,),
        ).fetchall():
            if used <= quota:
                break
            self._database.execute("DELETE FROM jobs WHERE id = ?", (id,))
            used -= size

    # -- webhooks

    def _add_delivery(self, job: str, message: Message | None, now: float) -> None:
        if message is not None:
            # A job ends once, so its id makes the message's: the same after every restart.
            self._database.execute(
                "INSERT INTO deliveries (id, job, event, url, body, next) VALUES (?, ?, ?, ?, ?, ?)",
                (job.replace("job_", "msg_", 1), job, message.event, message.url, message.body, now),
            )

    def due_deliveries(self, now: float) -> list[Delivery]:
        return self._deliveries("next <= ? ORDER BY next", now)

    def next_delivery(self, now: float) -> float | None:
        """When the first delivery that is not due yet will be."""
        [found] = self._database.execute("SELECT min(next) FROM deliveries WHERE next > ?", (now,)).fetchone()
        return None if found is None else float(found)

    def deliveries(self, job: str) -> list[Delivery]:
        return self._deliveries("job = ? ORDER BY id", job)

    def _deliveries(self, condition: str, value: Any) -> list[Delivery]:
        rows = self._database.execute(
            f"SELECT id, job, event, url, body, state, next FROM deliveries WHERE {condition}",  # noqa: S608
            (value,),
        ).fetchall()
        return [
            Delivery(id, job, event, url, body, state, next, self._attempts(id))
            for id, job, event, url, body, state, next in rows
        ]

    def _attempts(self, delivery: str) -> tuple[dict[str, Any], ...]:
        rows = self._database.execute(
            "SELECT at, seconds, status, error FROM attempts WHERE delivery = ? ORDER BY number", (delivery,)
        )
        return tuple(dict(zip(("at", "seconds", "status", "error"), row, strict=True)) for row in rows)

    def attempted(
        self, id: str, state: str, *, at: float, seconds: float, status: int | None, error: str | None,
        next: float | None,
    ) -> None:  # fmt: skip
        """One attempt at a delivery has ended; the next one is due at `next`."""
        with self._transaction():
            [number] = self._database.execute(
                "SELECT count(*) + 1 FROM attempts WHERE delivery = ?", (id,)
            ).fetchone()
            self._database.execute(
                "INSERT INTO attempts (delivery, number, at, seconds, status, error)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (id, number, at, seconds, status, error),
            )
            self._database.execute(
                "UPDATE deliveries SET state = ?, next = ? WHERE id = ?", (state, next, id)
            )


# Finished, and nobody waits for word of it: whoever is called must still find the result.
_REMOVABLE = (
    "finished IS NOT NULL AND NOT EXISTS"
    " (SELECT 1 FROM deliveries WHERE deliveries.job = jobs.id AND deliveries.next IS NOT NULL)"
)


def _record(row: tuple[Any, ...]) -> Record:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    for name in ("request", "info", "error"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return Record(**values)


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _new_file(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
