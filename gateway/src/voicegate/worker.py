"""One thread for everything that computes, with a bounded queue in front of it.

A model transcribes one request at a time: a second one beside it would only make both slower. So
jobs wait in order, and what the event loop does is hand them over and receive their items.
"""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Generic, TypeVar

from voicegate import errors

T = TypeVar("T")


class Job(Generic[T]):
    """Work in the queue. `run` is called in the thread with the job; it calls `emit` for every item."""

    def __init__(self, run: Callable[[Job[T]], None]) -> None:
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | BaseException | None] = asyncio.Queue()
        self._cancelled = threading.Event()

    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()

    def emit(self, item: T) -> None:
        self._send(item)

    def _send(self, item: T | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancel()

    def execute(self) -> None:
        try:
            if not self.cancelled():
                self._run(self)
        except BaseException as error:  # handed to whoever waits
            self._send(error)
        else:
            self._send(None)

    async def next(self) -> T | None:
        """The next item, None at the end; raises what the job raised."""
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item


class Worker:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs: collections.deque[Job[Any]] = collections.deque()
        self._changed = threading.Condition()
        self._running: Job[Any] | None = None
        self._closed = False
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="voicegate-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def running(self) -> int:
        return int(self._running is not None)

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._running is None and not self._jobs

    def retry_after(self) -> int:
        """Seconds until there should be room again, from how long recent jobs took."""
        return min(60, max(1, round(self._mean_seconds * max(1, self.waiting) / 2)))

    def check_room(self) -> None:
        """Refuse early, before an upload is read; `submit` decides."""
        with self._changed:
            if self._full():
                raise errors.queue_full(self.limit, self.retry_after())

    def _full(self) -> bool:
        # A job that finds the thread free does not wait, so a limit of 0 still lets one through.
        ahead = len(self._jobs) + self.running
        return ahead > self.limit

    def submit(self, run: Callable[[Job[T]], None], *, internal: bool = False) -> Job[T]:
        """Queue a job. ApiError (429) when too many wait; `internal` jobs are the server's own."""
        job: Job[T] = Job(run)
        with self._changed:
            if self._closed:
                raise errors.unavailable("The server is shutting down.", "shutting_down")
            if not internal and self._full():
                raise errors.queue_full(self.limit, self.retry_after())
            self._jobs.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job[Any]) -> None:
        """Take a waiting job out of the queue; tell a running one to stop at its next step."""
        job.cancel()
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def close(self, timeout: float = 10.0) -> None:
        with self._changed:
            self._closed = True
            for job in [*self._jobs, self._running]:
                if job is not None:
                    job.cancel()
            self._jobs.clear()
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if not self._jobs:
                    return
                job = self._running = self._jobs.popleft()
            started = time.monotonic()
            try:
                job.execute()
            finally:
                seconds = time.monotonic() - started
                with self._changed:
                    self._mean_seconds += (seconds - self._mean_seconds) / 4
                    self._running = None
                del job  # holds the upload and, through its closure, the samples


async def stream(
    worker: Worker, run: Callable[[Job[T]], None], *, internal: bool = False
) -> AsyncGenerator[T, None]:
    """Run a job in the worker and yield what it emits. Closing the generator cancels the job."""
    job = worker.submit(run, internal=internal)
    finished = False
    try:
        while (item := await job.next()) is not None:
            yield item
        finished = True
    finally:
        if not finished:
            worker.cancel(job)
