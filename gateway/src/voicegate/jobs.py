"""Jobs: transcriptions that are stored first and done when the engine has time.

One runner takes them in order and hands each to the engine with the lowest rank. While a job runs, what it
has given is in memory only; its result, its status and its webhook are stored together in one transaction.
So a job whose server was killed is simply run again, and nobody has seen an end of it before.

What goes wrong is either the job's own fault, which ends it with an error; or may be (the engine died
over it), which is tried again a few times; or it is not, and then the job waits as long as it takes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from voicegate import errors, webhook_rules, wire
from voicegate.diarizer import Diarizer, with_turns
from voicegate.engine import Engine, Info, Options, Rank, Segment
from voicegate.errors import ApiError
from voicegate.logs import event, logger, request_id
from voicegate.settings import Settings
from voicegate.store import Delivery, JobConflict, Message, QuotaFull, Record, Store, TooManyJobs, new_id
from voicegate.subtitles import Layout
from voicegate.transcription import Asked
from voicegate.uploads import MIB
from voicegate.webhooks import Webhooks

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 3  # of a job over which the engine dies
PAUSES = (1.0, 5.0, 30.0)  # seconds before something is tried again
# A job goes before those accepted up to so many seconds earlier: an order in which nothing starves.
PRIORITIES = {"high": 3600.0, "normal": 0.0, "low": -3600.0}
SWEEP = 60.0  # seconds between looks for jobs that were kept long enough
# What no other audio would change. Any other failure of the engine may be the job's own, and comes to an end.
_NOT_THE_JOB = (
    "model_load_failed",
    "shutting_down",
    "vram_busy",
    "engine_unreachable",
    "engine_key",
    "engine_model_missing",
    "diarization_unreachable",
    "diarization_key",
    "diarization_model_missing",
)


@dataclass
class Live:
    """What the running job has given so far."""

    record: Record
    info: Info | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    cancelled: bool = False  # by a client, and stored as such

    @property
    def progress(self) -> float:
        """Percent; 100 is for a result that is stored."""
        if self.info is None or not self.segments or self.info.duration <= 0:
            return 0.0
        end: float = self.segments[-1]["end"]
        return round(min(99.0, 100 * end / self.info.duration), 1)


@dataclass(frozen=True)
class Look:
    """A job at one moment, with its segments so far (as `dataclasses.asdict` gives them)."""

    record: Record
    info: dict[str, Any] | None
    progress: float
    segments: list[dict[str, Any]]


class StoredAudio:
    """The audio of a job, opened when the engine wants it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._closed = False

    def descriptor(self) -> int:
        if self._closed:
            raise ValueError("the job's audio is closed")
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise audio_lost(error) from error
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return self._descriptor

    def close(self) -> None:
        self._closed = True
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def audio_lost(error: OSError) -> ApiError:
    return ApiError(
        410,
        f"The audio of this job can no longer be read: {error.strerror or error}. Send it again.",
        code="audio_lost",
    )


def not_found(id: str) -> ApiError:
    return ApiError(
        404,
        f"There is no job '{id}'. Finished jobs are removed after a while.",
        param="id",
        code="job_not_found",
    )


def too_many(limit: int, retry_after: int) -> ApiError:
    return ApiError(
        429,
        f"{limit} jobs are waiting already, as many as this server takes. Try again in {retry_after} s.",
        type="rate_limit_error",
        code="too_many_jobs",
        headers={"Retry-After": str(retry_after)},
    )


def quota_full(used: int, quota_mib: int) -> ApiError:
    return ApiError(
        507,
        f"There is no room for this audio: jobs that cannot be removed yet take {used / MIB:.1f} of"
        f" {quota_mib} MiB. Try again when some of them have finished, or let the server keep more"
        " (--job-quota-mib, VOICEGATE_JOB_QUOTA_MIB).",
        type="server_error",
        code="job_quota_exceeded",
    )


Decision = Literal["fail", "again", "wait"]


def decide(error: ApiError, failures: int) -> Decision:
    """What becomes of a job that met `error` after so many failures that were counted.

    fail: the error is its end. again: later, and it counts. wait: it has nothing to do with the job.
    """
    if error.status in (408, 429) or error.code in _NOT_THE_JOB:
        return "wait"
    return "again" if error.status >= 500 and failures + 1 < ATTEMPTS else "fail"


class Jobs:
    def __init__(
        self, settings: Settings, engine: Engine, store: Store, diarizer: Diarizer | None = None
    ) -> None:
        """`store` was opened in any thread; from here on only this object's thread calls it."""
        self.closing = False
        self._settings = settings
        self._engine = engine
        self._diarizer = diarizer
        self._store = store
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "voicegate-store")
        self._accepting = asyncio.Lock()  # room is looked at, then used
        self._wake = asyncio.Event()
        self._live: Live | None = None
        self._running: asyncio.Task[None] | None = None
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._mean_seconds = 5.0
        secrets: tuple[bytes, ...] = ()
        if settings.webhook_secret:
            secrets = webhook_rules.secrets_from(settings.webhook_secret)
        allowed = webhook_rules.Allowed.parse(settings.webhook_allow)
        self.webhooks = Webhooks(store, self._until_stored, secrets, allowed)

    @classmethod
    async def open(cls, settings: Settings, engine: Engine, diarizer: Diarizer | None = None) -> Jobs:
        """StoreError if `data_dir` cannot be used. What was running when the last server ended is queued."""
        store = await asyncio.to_thread(Store, Path(settings.data_dir))
        self = cls(settings, engine, store, diarizer)
        recovered = await self._stored(store.recover)
        counts = await self._stored(store.counts)
        event("jobs_opened", folder=settings.data_dir, queued=counts["queued"], recovered=recovered)
        return self

    def start(self) -> None:
        self._tasks = [asyncio.create_task(work()) for work in (self._work, self._sweep, self.webhooks.work)]
        for task in self._tasks:
            task.add_done_callback(_report)

    async def stop(self) -> None:
        """What runs is queued again at the next start."""
        self.end_streams()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)
        self._store.close()

    def end_streams(self) -> None:
        """Their clients come back with the id of the last event they saw."""
        self.closing = True
        for id in list(self._watchers):
            self._changed(id)

    async def _stored(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, functools.partial(call, *args, **kwargs))

    async def _until_stored(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """For work nobody waits for: a full disk delays it, and that is all."""
        tries = 0
        while True:
            try:
                return await self._stored(call, *args, **kwargs)
            except (sqlite3.DatabaseError, OSError) as error:
                pause = PAUSES[min(tries, len(PAUSES) - 1)]
                tries += 1
                event("store_failed", level=logging.ERROR, error=str(error), again_in_seconds=pause)
                await asyncio.sleep(pause)

    # -- what clients ask

    @property
    def _quota(self) -> int:
        return self._settings.job_quota_mib * MIB

    async def check_room(self, size: int) -> None:
        """Refuse early, before an upload of about `size` bytes is read; `accept` decides."""
        with self._refusals():
            await self._stored(
                self._store.check_room, size, limit=self._settings.job_limit, quota=self._quota
            )

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except TooManyJobs:
            retry_after = min(600, max(1, round(self._mean_seconds)))
            raise too_many(self._settings.job_limit, retry_after) from None
        except QuotaFull as error:
            raise quota_full(error.used, self._settings.job_quota_mib) from None
        except JobConflict:
            raise ApiError(
                422,
                "This Idempotency-Key was used for another request. Use a new key for a new job.",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            ) from None
        except (OSError, sqlite3.OperationalError) as error:
            event("store_failed", level=logging.ERROR, error=str(error))
            raise errors.no_space("job", getattr(error, "strerror", None) or error) from error

    async def accept(
        self, asked: Asked, size: int, *, webhook_url: str | None, priority: str, key: str | None
    ) -> tuple[str, bool]:
        """The id of the job, which is stored when this returns; and whether the key had brought it before."""
        request = {**_request(asked), "priority": priority}
        with self._refusals():
            source = os.dup(asked.upload.descriptor())
        # Shielded: a copy that has begun must not lose its lock, or its file, to a request that is dropped.
        return await asyncio.shield(self._accept(request, source, size, webhook_url, key))

    async def _accept(
        self, request: dict[str, Any], source: int, size: int, webhook_url: str | None, key: str | None
    ) -> tuple[str, bool]:
        async with self._accepting:
            with self._refusals():
                now = time.time()
                id = new_id(now)
                audio = await asyncio.to_thread(self._store.save_audio, id, source)
                stored = False
                try:
                    asked_for = json.dumps([audio, request, webhook_url], sort_keys=True)
                    fingerprint = hashlib.sha256(asked_for.encode()).hexdigest()
                    if key and (found := await self._stored(self._store.find_by_key, key, fingerprint)):
                        return found.id, True
                    await self._stored(
                        self._store.insert, id, request, now=now, due=now - PRIORITIES[request["priority"]],
                        size=size, webhook_url=webhook_url, key=key, fingerprint=fingerprint,
                        limit=self._settings.job_limit, quota=self._quota,
                    )  # fmt: skip
                    stored = True
                finally:
                    if not stored:
                        await asyncio.to_thread(self._store.drop_audio, id)
        event("job_accepted", job=id, bytes=size, priority=request["priority"])
        self._wake.set()
        return id, False

    async def look(self, id: str, *, segments: bool = True) -> Look:
        """ApiError (404) if there is no such job."""
        while True:
            record = await self._stored(self._store.get, id)
            if record is None:
                raise not_found(id)
            if record.status != "running":
                found = await self._stored(self._store.segments, id) if segments else []
                return Look(record, record.info, 100.0 if record.status == "done" else 0.0, found)
            live = self._live
            if live is not None and (live.record.id, live.record.runs) == (id, record.runs):
                info = None if live.info is None else dataclasses.asdict(live.info)
                return Look(record, info, live.progress, live.segments)
            await asyncio.sleep(0)  # it begins or ends at this moment

    async def page(self, **conditions: Any) -> list[Record]:
        return await self._stored(self._store.page, **conditions)

    def progress(self, record: Record) -> float:
        """Without its segments, for lists."""
        if record.status == "running" and self._live is not None and self._live.record.id == record.id:
            return self._live.progress
        return 100.0 if record.status == "done" else 0.0

    async def result(self, id: str) -> tuple[Asked, Info, list[Segment]]:
        """Of a job that is done; ApiError (404, 409) otherwise."""
        look = await self.look(id)
        record = look.record
        if record.status != "done" or look.info is None:
            if record.error is not None:
                why = f"has failed: {record.error['message']}"
            else:
                why = "was cancelled" if record.status == "cancelled" else f"is {record.status}"
            raise ApiError(409, f"The job {why}. There is no result.", code=f"job_{record.status}")
        segments = [wire.segment_from(value) for value in look.segments]
        return _asked(record.request, StoredAudio(self._store.audio(id))), wire.info_from(look.info), segments

    async def deliveries(self, id: str) -> list[Delivery]:
        await self.look(id, segments=False)
        return await self._stored(self._store.deliveries, id)

    async def cancel(self, id: str) -> Look:
        """End a job; a running one stops within its segment. ApiError (409) if it is done or failed."""
        now = time.time()
        before = (await self.look(id, segments=False)).record
        message = _message(replace(before, status="cancelled", finished=now))
        if await self._stored(self._store.cancel, id, now=now, message=message):
            if self._live is not None and self._live.record.id == id and self._running is not None:
                self._live.cancelled = True
                self._running.cancel()
            event("job_cancelled", job=id)
            self._changed(id)
            self.webhooks.wake.set()
        after = await self.look(id, segments=False)
        if after.record.status != "cancelled":
            raise ApiError(
                409, f"The job is {after.record.status}; there is nothing to cancel.", code="job_finished"
            )
        return after

    # -- who watches

    @contextlib.contextmanager
    def watch(self, id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job changes."""
        changed = asyncio.Event()
        self._watchers.setdefault(id, set()).add(changed)
        try:
            yield changed
        finally:
            self._watchers[id].discard(changed)
            if not self._watchers[id]:
                del self._watchers[id]

    def _changed(self, id: str) -> None:
        for changed in self._watchers.get(id, ()):
            changed.set()

    # -- running them

    async def _work(self) -> None:
        waits = 0  # in a row, for an engine that cannot work
        while True:
            self._wake.clear()
            record = await self._until_stored(self._store.start_next, time.time())
            if record is None:
                due = await self._until_stored(self._store.next_start)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if due is None else max(0.0, due - time.time())):
                        await self._wake.wait()
                continue
            token = request_id.set(record.id)  # in the engine's log, too
            try:
                decision = await self._run(record)
            finally:
                self._live = self._running = None
                request_id.reset(token)
                self._changed(record.id)
            if decision == "wait":
                await asyncio.sleep(PAUSES[min(waits, len(PAUSES) - 1)])
                waits += 1
            else:
                waits = 0

    async def _run(self, record: Record) -> Decision | None:
        """Run a job once and store what came of it; None if it has ended."""
        live = self._live = Live(record)
        self._changed(record.id)
        self._running = asyncio.create_task(self._transcribe(live))
        try:
            await asyncio.wait({self._running})
        finally:
            self._running.cancel()
            await asyncio.wait({self._running})
        if live.cancelled:
            return None
        # Cancelled by nobody here, it is as good as an error of its own.
        failure = errors.internal() if self._running.cancelled() else self._running.exception()
        if failure is None:
            await self._end(live)
            return None
        if not isinstance(failure, ApiError):
            logger.error("job_failed", exc_info=failure)
            failure = errors.internal()
        decision = decide(failure, record.failures)
        event("job_failed", level=logging.WARNING, error=failure.code or failure.message, decision=decision)
        if decision == "fail":
            await self._end(live, failure)
            return None
        again = decision == "again"
        pause = PAUSES[min(record.failures, len(PAUSES) - 1)] if again else 0.0
        await self._until_stored(
            self._store.put_back, record.id, not_before=time.time() + pause, failed=again
        )
        return decision

    async def _transcribe(self, live: Live) -> None:
        asked = _asked(live.record.request, source := StoredAudio(self._store.audio(live.record.id)))
        try:
            async with contextlib.aclosing(self._engine.transcribe(source, asked.options, Rank.JOB)) as items:
                async for item in items:
                    if isinstance(item, Info):
                        live.info = item
                    else:
                        live.segments.append(dataclasses.asdict(item))
                    self._changed(live.record.id)
            if live.info is None:  # an engine that does not keep to the interface
                raise errors.internal()
            if asked.diarized:
                live.info = await with_turns(self._diarizer, live.info, live.segments, source, Rank.JOB)
        finally:
            source.close()

    async def _end(self, live: Live, error: ApiError | None = None) -> None:
        now = time.time()
        status: Literal["done", "failed"] = "done" if error is None else "failed"
        info = None if live.info is None else dataclasses.asdict(live.info)
        body = None if error is None else error.body()["error"]
        ended = replace(live.record, status=status, finished=now, info=info, error=body)
        stored = await self._until_stored(
            self._store.finish, live.record, status, now=now, quota=self._quota, info=info, error=body,
            segments=live.segments if error is None else [], message=_message(ended),
        )  # fmt: skip
        self.webhooks.wake.set()
        if not stored:  # cancelled in the last moment
            return
        seconds = now - (live.record.started or now)
        self._mean_seconds += (seconds - self._mean_seconds) / 4
        event("job_ended", status=status, seconds=seconds, segments=len(live.segments))

    async def _sweep(self) -> None:
        while True:
            if hours := self._settings.job_retention_hours:
                removed = await self._until_stored(self._store.expire, time.time() - hours * 3600)
                if removed:
                    event("jobs_removed", count=removed, older_than_hours=hours)
            await asyncio.sleep(SWEEP)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("jobs_stopped", exc_info=error)


def _request(asked: Asked) -> dict[str, Any]:
    """What is stored of a request; `_asked` makes it whole again."""
    return {
        "options": dataclasses.asdict(asked.options),
        "response_format": asked.response_format,
        "granularities": list(asked.granularities),
        "layout": dataclasses.asdict(asked.layout or Layout()),
    }


def _asked(request: dict[str, Any], audio: StoredAudio) -> Asked:
    return Asked(
        audio,
        Options(**request["options"]),
        request["response_format"],
        tuple(request["granularities"]),
        False,
        Layout(**request["layout"]),
    )


def described(record: Record, progress: float, info: dict[str, Any] | None) -> dict[str, Any]:
    """A job as clients see it, without its segments. Times in seconds since 1970."""
    options = record.request["options"]
    return {
        "id": record.id,
        "object": "job",
        "status": record.status,
        "progress": progress,
        "task": options["task"],
        "language": info["language"] if info else options["language"],
        "duration": None if info is None else round(info["duration"], 3),
        "priority": record.request["priority"],
        "created_at": round(record.created, 3),
        "started_at": None if record.started is None else round(record.started, 3),
        "finished_at": None if record.finished is None else round(record.finished, 3),
        "error": record.error,
        "webhook_url": record.webhook_url,
    }


def _message(ended: Record) -> Message | None:
    if ended.webhook_url is None or ended.finished is None:
        return None
    progress = 100.0 if ended.status == "done" else 0.0
    name = f"job.{ended.status}"
    body = {
        "type": name,
        "timestamp": datetime.fromtimestamp(ended.finished, UTC).isoformat(),
        "data": described(ended, progress, ended.info),
    }
    return Message(name, ended.webhook_url, json.dumps(body, separators=(",", ":")).encode())


async def events(
    jobs: Jobs, id: str, seen: str, pause: float
) -> AsyncGenerator[tuple[str, str, Any] | None, None]:
    """What happens to a job, as (event, its id, data), until its end; None after `pause` seconds of nothing.

    `seen` is the id of the last event that the client knows: RUN.SEGMENTS. A run that was not finished
    begins anew, which `restarted` says: what was seen of it no longer counts.
    """
    run, known = position(seen)
    shown: tuple[str, float] | None = None
    with jobs.watch(id) as changed:
        while not jobs.closing:
            changed.clear()
            look = await jobs.look(id)
            record = look.record
            if known and record.runs != run:
                known = 0
                yield "restarted", f"{record.runs}.0", {"id": id}
            run = record.runs
            segments = look.segments
            while known < len(segments):
                segment = segments[known]
                known += 1
                yield "segment", f"{run}.{known}", brief(segment, known - 1)
            if record.finished is not None:
                yield record.status, f"{run}.end", described(record, look.progress, look.info)
                return
            if shown != (record.status, look.progress):
                shown = (record.status, look.progress)
                yield "progress", f"{run}.{known}", {"id": id, "status": shown[0], "progress": shown[1]}
            while not changed.is_set():
                try:
                    async with asyncio.timeout(pause):
                        await changed.wait()
                except TimeoutError:
                    yield None


def position(seen: str) -> tuple[int, int]:
    """Run and number of segments from an event's id; zeros for one that is none of ours."""
    run, _dot, known = seen.partition(".")
    if run.isascii() and run.isdigit() and known.isascii() and known.isdigit() and len(seen) < 32:
        return int(run), int(known)
    return 0, 0


def brief(segment: dict[str, Any], number: int) -> dict[str, Any]:
    """A segment as clients see it on the way; the result in verbose_json has the rest."""
    shown = {
        "id": number,
        "start": round(segment["start"], 3),
        "end": round(segment["end"], 3),
        "text": segment["text"],
    }
    if segment["words"]:
        shown["words"] = [
            {"word": word["word"].strip(), "start": round(word["start"], 3), "end": round(word["end"], 3)}
            for word in segment["words"]
        ]
    return shown
