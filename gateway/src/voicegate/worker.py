"""One at a time, with a bounded queue in front.

A model transcribes one request at a time: a second one beside it would only make both slower. So
jobs wait: by rank, then in the order in which they came.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Generic, TypeVar

from voicegate import errors
from voicegate.engine import Rank

T = TypeVar("T")


class Job(Generic[T]):
    """Work in the queue. `run` is awaited with the job; it calls `emit` for every item.

    A cancelled job is not interrupted: `run` ends it in order, so that the next one finds the engine free.
    """

    def __init__(self, run: Callable[[Job[T]], Awaitable[None]], rank: Rank) -> None:
        self.rank = rank
        self.cancelled = asyncio.Event()
        self._run = run
        self._items: asyncio.Queue[T | Exception | None] = asyncio.Queue()

    def emit(self, item: T) -> None:
        self._items.put_nowait(item)

    async def execute(self) -> None:
        try:
            if not self.cancelled.is_set():
                await self._run(self)
        except Exception as error:  # handed to whoever waits
            self._items.put_nowait(error)
        else:
            self._items.put_nowait(None)

    def refuse(self, error: Exception) -> None:
        self._items.put_nowait(error)

    async def next(self) -> T | None:
        """The next item, None at the end; raises what the job raised."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item


class Worker:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs: list[tuple[Rank, int, Job[Any]]] = []
        self._numbers = itertools.count()
        self._running: Job[Any] | None = None
        self._closed = False
        self._mean_seconds = 1.0
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Requests in the queue; the server's own jobs are not among them."""
        return sum(rank == Rank.INTERACTIVE for rank, _number, _job in self._jobs)

    @property
    def running(self) -> int:
        return int(self._running is not None)

    def retry_after(self) -> int:
        """Seconds until there should be room again, from how long recent jobs took."""
        return min(60, max(1, round(self._mean_seconds * max(1, self.waiting) / 2)))

    def check_room(self) -> None:
        """Refuse early, before an upload is read; `submit` decides."""
        # A job that finds the engine free does not wait, so a limit of 0 still lets one through.
        if self.waiting + self.running > self.limit:
            raise errors.queue_full(self.limit, self.retry_after())

    def submit(self, run: Callable[[Job[T]], Awaitable[None]], rank: Rank = Rank.INTERACTIVE) -> Job[T]:
        """Queue a job. ApiError (429) when too many wait."""
        if self._closed:
            raise errors.unavailable("The server is shutting down.", "shutting_down")
        if rank == Rank.INTERACTIVE:
            self.check_room()
        job: Job[T] = Job(run, rank)
        bisect.insort(self._jobs, (rank, next(self._numbers), job))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return job

    def cancel(self, job: Job[Any]) -> None:
        """Take a waiting job out of the queue; tell a running one to stop at its next step."""
        job.cancelled.set()
        self._jobs = [entry for entry in self._jobs if entry[2] is not job]

    async def close(self) -> None:
        """Refuse what waits and what comes, stop what runs at its next step."""
        self._closed = True
        for _rank, _number, job in self._jobs:
            job.refuse(errors.unavailable("The server is shutting down.", "shutting_down"))
        self._jobs.clear()
        if self._running is not None:
            self._running.cancelled.set()
        if self._task is not None:
            await self._task

    async def _work(self) -> None:
        while self._jobs:
            job = self._running = self._jobs.pop(0)[2]
            started = time.monotonic()
            try:
                await job.execute()
            finally:
                self._mean_seconds += (time.monotonic() - started - self._mean_seconds) / 4
                self._running = None
            del job  # holds the upload
        self._task = None


async def stream(
    worker: Worker, run: Callable[[Job[T]], Awaitable[None]], rank: Rank = Rank.INTERACTIVE
) -> AsyncGenerator[T, None]:
    """Run a job in the worker and yield what it emits. Closing the generator cancels the job."""
    job = worker.submit(run, rank)
    finished = False
    try:
        while (item := await job.next()) is not None:
            yield item
        finished = True
    finally:
        if not finished:
            worker.cancel(job)
