"""Who goes next: one scheduler for one engine, with a bounded queue in front.

A model computes one thing at a time: two at once would only make both slower. So work is cut into steps
(a segment: at most one 30-second window, as long as there is speech in it), and before each step the one
that should go next is chosen anew. What was passed over keeps its state and goes on later. Preparing (reading
the audio, finding the speech) happens beside that, so that it costs the engine no time.

The order (`choose`): whoever waited too long for its rank gets one step; else the better rank; in it the
client that had the least of the engine's time; then who came first.

An engine elsewhere may take several at once (`parallel`), and a step there may be a whole file: then live
speech goes one beyond (`live_beyond`).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from voicegate import errors
from voicegate.engine import Rank

T = TypeVar("T")
R = TypeVar("R")

# Seconds without a step after which one is due whatever else waits: a file moves on by a segment a minute
# at the least, under any load.
DUE = {Rank.LIVE: 5.0, Rank.DRAFT: 5.0, Rank.INTERACTIVE: 20.0, Rank.JOB: 60.0}
# How many may be open, each with its audio in memory. Every rank has its own: a better one finds room always.
OPEN = {Rank.LIVE: 8, Rank.DRAFT: 8, Rank.INTERACTIVE: 4, Rank.JOB: 2}
OPEN_PER_CLIENT = 2  # one computes, the next one is prepared


class Work(Protocol):
    def prepare(self) -> Coroutine[Any, Any, None]:
        """Everything before the first step; runs while others compute."""

    async def step(self) -> bool:
        """The next piece, with the engine to itself; False when that was the last."""

    def close(self) -> None:
        """Called once, at the end or when cancelled."""


@dataclass(frozen=True)
class Candidate:
    """Something that could take its next step. `since`: seconds on the clock when it began to wait for it."""

    rank: Rank
    client: str
    order: int
    since: float


def choose(
    candidates: Iterable[Candidate], served: Mapping[tuple[Rank, str], float], now: float
) -> Candidate:
    """Who takes the next step. `served`: seconds of the engine by rank and client."""
    everybody = list(candidates)
    due = [item for item in everybody if now - item.since >= DUE.get(item.rank, 0.0)]
    # The server's own is always due, and first.
    if due:
        return min(due, key=lambda item: (item.rank != Rank.SERVER, item.since, item.order))
    return min(everybody, key=lambda item: (item.rank, served.get((item.rank, item.client), 0.0), item.order))


class Job(Generic[T]):
    """Work in the queue; it calls `emit` for every item."""

    def __init__(self, rank: Rank, client: str, order: int) -> None:
        self.rank = rank
        self.client = client
        self.order = order
        self.cancelled = asyncio.Event()
        self.work: Work
        self.preparing: asyncio.Task[None] | None = None
        self.ready = False
        self.since = 0.0
        self.seconds = 0.0  # of the engine
        self._items: asyncio.Queue[T | BaseException | None] = asyncio.Queue()

    def emit(self, item: T) -> None:
        self._items.put_nowait(item)

    def end(self, error: BaseException | None = None) -> None:
        self._items.put_nowait(error)

    async def unless_cancelled(self, work: Coroutine[Any, Any, R]) -> R | None:
        """The result of `work`; None if nobody wants this job any more, and then the work is cancelled."""
        doing = asyncio.create_task(work)
        leaving = asyncio.create_task(self.cancelled.wait())
        try:
            await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return doing.result() if doing.done() else None
        finally:
            for task in (doing, leaving):
                task.cancel()
            await asyncio.gather(doing, leaving, return_exceptions=True)

    async def next(self) -> T | None:
        """The next item, None at the end; raises what the work raised."""
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item


class Stepping(NamedTuple):
    """A job in the middle of a step, since when (on the clock), and the task that waits for its end."""

    job: Job[Any]
    started: float
    task: asyncio.Task[None]


class Worker:
    def __init__(
        self,
        limit: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        parallel: int = 1,
        live_beyond: bool = False,
    ) -> None:
        self.limit = limit
        self._clock = clock
        self._parallel = parallel
        self._live_beyond = live_beyond
        self._stepping: dict[int, Stepping] = {}  # by order
        self._jobs: dict[int, Job[Any]] = {}  # by order
        self._numbers = itertools.count()
        self._served: dict[tuple[Rank, str], float] = {}
        self._current: Job[Any] | None = None
        self._changed = asyncio.Event()
        self._closed = False
        self._mean_seconds = 1.0
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Interactive requests that are not being worked on."""
        return self._interactive() - sum(job.rank == Rank.INTERACTIVE for job in self._working().values())

    @property
    def running(self) -> int:
        return len(self._working())

    def _working(self) -> dict[int, Job[Any]]:
        """Those in the middle of a step, and the one that took or prepares one last."""
        working = {order: stepping.job for order, stepping in self._stepping.items()}
        return working if self._current is None else {**working, self._current.order: self._current}

    def _interactive(self) -> int:
        return sum(job.rank == Rank.INTERACTIVE for job in self._jobs.values())

    def retry_after(self) -> int:
        """Seconds until there should be room again, from how long recent jobs took."""
        seconds = self._mean_seconds * max(1, self.waiting) / self._parallel
        return min(60, max(1, round(seconds / 2)))

    def check_room(self) -> None:
        """Refuse early, before an upload is read; `submit` decides."""
        # Stored jobs give way and live sessions have a limit of their own: neither is in the way.
        if self._interactive() >= self.limit + self._parallel:
            raise errors.queue_full(self.limit, self.retry_after())

    def submit(
        self, make: Callable[[Job[T]], Work], rank: Rank = Rank.INTERACTIVE, client: str = ""
    ) -> Job[T]:
        """Queue a job. ApiError (429) when too many wait."""
        if self._closed:
            raise errors.unavailable("The server is shutting down.", "shutting_down")
        if rank == Rank.INTERACTIVE:
            self.check_room()
        job: Job[T] = Job(rank, client, next(self._numbers))
        job.work = make(job)
        key = (rank, client)
        if key not in self._served:
            # Who was away has saved up nothing: it begins level with whoever had the least.
            self._served[key] = min(
                (seconds for (other, _client), seconds in self._served.items() if other == rank), default=0.0
            )
        self._jobs[job.order] = job
        self._admit()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return job

    def cancel(self, job: Job[Any]) -> None:
        """Take a job out. One in the middle of a step is left to end that step."""
        job.cancelled.set()
        if job.preparing is not None and not job.ready:
            job.preparing.cancel()
        if job.preparing is None:
            self._remove(job)
        self._changed.set()

    async def close(self) -> None:
        """Refuse what waits and what comes, stop what runs at its next step."""
        self._closed = True
        working = self._working()
        for job in list(self._jobs.values()):
            if job.order not in working:
                job.end(errors.unavailable("The server is shutting down.", "shutting_down"))
            self.cancel(job)
        if self._task is not None:
            await self._task

    def _admit(self) -> None:
        """Begin to prepare as many as may be open, in their order; first who has fewest open."""
        open_jobs = [job for job in self._jobs.values() if job.preparing is not None]
        ranks = Counter(job.rank for job in open_jobs)
        clients = Counter((job.rank, job.client) for job in open_jobs)
        waiting = sorted(
            (job for job in self._jobs.values() if job.preparing is None),
            key=lambda job: (clients[job.rank, job.client], job.order),
        )
        for job in waiting:
            key = (job.rank, job.client)
            # With several at once as many compute, and the next ones are prepared.
            most = max(OPEN.get(job.rank, 0), 2 * self._parallel)
            per_client = max(OPEN_PER_CLIENT, self._parallel + 1)
            if job.rank != Rank.SERVER and (ranks[job.rank] >= most or clients[key] >= per_client):
                continue
            ranks[job.rank] += 1
            clients[key] += 1
            job.preparing = asyncio.create_task(job.work.prepare())
            job.preparing.add_done_callback(functools.partial(self._prepared, job))
            if self._current is None:
                self._current = job

    def _prepared(self, job: Job[Any], task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._finish(job, None)
        elif (error := task.exception()) is not None:
            self._finish(job, error)
        else:
            job.ready = True
            job.since = self._clock()
        self._changed.set()

    async def _run(self) -> None:
        while self._jobs:
            self._changed.clear()
            ready = {
                order: job for order, job in self._jobs.items() if job.ready and order not in self._stepping
            }
            if gone := [job for job in ready.values() if job.cancelled.is_set()]:
                for job in gone:
                    self._finish(job, None)
                continue
            candidates = [
                Candidate(job.rank, job.client, job.order, job.since)
                for job in ready.values()
                if self._has_room(job.rank)
            ]
            if not candidates:
                await self._changed.wait()
                continue
            now = self._clock()
            job = ready[choose(candidates, self._shares(now), now).order]
            self._current = job
            self._stepping[job.order] = Stepping(job, now, asyncio.create_task(self._step(job, now)))
        self._task = None

    def _has_room(self, rank: Rank) -> bool:
        """Whether one more may begin a step; live speech also beside others that have taken all the room."""
        if len(self._stepping) < self._parallel:
            return True
        others = any(stepping.job.rank != Rank.LIVE for stepping in self._stepping.values())
        return self._live_beyond and rank == Rank.LIVE and others and len(self._stepping) == self._parallel

    def _shares(self, now: float) -> Mapping[tuple[Rank, str], float]:
        """Seconds of the engine by rank and client, with those of the steps that are not done."""
        shares = dict(self._served)
        for job, started, _unused in self._stepping.values():
            shares[job.rank, job.client] = shares.get((job.rank, job.client), 0.0) + now - started
        return shares

    async def _step(self, job: Job[Any], started: float) -> None:
        error: Exception | None = None
        try:
            more = await job.work.step()
        except Exception as caught:  # handed to whoever waits
            more, error = False, caught
        now = self._clock()
        del self._stepping[job.order]
        job.since = now
        job.seconds += now - started
        self._served[job.rank, job.client] += now - started
        if not more:
            self._mean_seconds += (job.seconds - self._mean_seconds) / 4
            self._finish(job, error)
        self._changed.set()

    def _finish(self, job: Job[Any], error: BaseException | None) -> None:
        job.ready = False
        job.work.close()
        job.end(error)
        self._remove(job)

    def _remove(self, job: Job[Any]) -> None:
        self._jobs.pop(job.order, None)
        key = (job.rank, job.client)
        if not any((other.rank, other.client) == key for other in self._jobs.values()):
            self._served.pop(key, None)
        if self._current is job:
            stepping = [step.job for step in self._stepping.values()]
            others = [item for item in self._jobs.values() if item.preparing is not None]
            self._current = next(iter(stepping + others), None)
        self._admit()
        self._changed.set()


class OneStep:
    """Something that has the engine to itself."""

    def __init__(self, work: Callable[[], Awaitable[Any]]) -> None:
        self._work = work

    async def prepare(self) -> None: ...

    async def step(self) -> bool:
        await self._work()
        return False

    def close(self) -> None: ...


async def stream(
    worker: Worker, make: Callable[[Job[T]], Work], rank: Rank = Rank.INTERACTIVE, client: str = ""
) -> AsyncGenerator[T, None]:
    """Run a job in the worker and yield what it emits. Closing the generator cancels the job."""
    job = worker.submit(make, rank, client)
    finished = False
    try:
        while (item := await job.next()) is not None:
            yield item
        finished = True
    finally:
        if not finished:
            worker.cancel(job)
