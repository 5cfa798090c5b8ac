"""Webhooks, the calls: one signed POST when a job has ended, tried again until somebody took it.

A name is resolved once, its addresses are held against the rules, and the connection goes to one that
passed: an answer that changes in between leads nowhere. Certificates are still checked against the name.
Redirects are not followed, proxies of the environment not used, and of an answer only its status counts.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import logging
import socket
import ssl
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import httpcore2

from voicegate import __version__
from voicegate.logs import event, logger
from voicegate.store import Delivery, Store
from voicegate.webhook_rules import PAUSES, Address, Allowed, signature

TIMEOUT = 10.0  # seconds for one attempt, from resolving the name to the end of the answer
AT_ONCE = 16  # deliveries in flight
ANSWER_BYTES = 64 * 1024  # read of an answer, so that most connections end in order


class Refused(Exception):
    """The rules do not let this host be called."""


class Resolver:
    """Names to the addresses that may be called. Threads of its own: a slow name server stops nobody else."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._threads = concurrent.futures.ThreadPoolExecutor(4, "voicegate-resolve")

    async def addresses(self, host: str, port: int) -> list[Address]:
        """OSError if there is no such name; Refused if none of its addresses may be called."""
        # The system's own resolver, which also knows the old forms of IPv4 addresses (0x7f.1, 2130706433).
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        permitted: list[Address] = []
        refusal = ""
        for *_unused, place in found:
            address = ipaddress.ip_address(place[0])
            reason = self._allowed.refusal(host, address)
            if reason is None:
                permitted.append(address)
            refusal = reason or refusal
        if not permitted:
            raise Refused(refusal)
        return permitted

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to addresses that passed the rules, and to nothing else."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        *others, last = await self._resolver.addresses(host, port)
        for address in others:
            with contextlib.suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout):
                return await self._network.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
        return await self._network.connect_tcp(str(last), port, timeout, local_address, socket_options)


class Webhooks:
    def __init__(
        self,
        store: Store,
        stored: Callable[..., Awaitable[Any]],
        secrets: tuple[bytes, ...],
        allowed: Allowed,
    ) -> None:
        """`stored` calls a method of the store in its thread."""
        self.secrets = secrets
        self.wake = asyncio.Event()
        self._store = store
        self._stored = stored
        self._resolver = Resolver(allowed)
        self._tls: ssl.SSLContext | None = None
        self._room = asyncio.Semaphore(AT_ONCE)
        self._flying: dict[str, asyncio.Task[None]] = {}

    async def check(self, url: str) -> None:
        """Refused if the host may not be called. A name that cannot be resolved now may be later on."""
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with contextlib.suppress(OSError, UnicodeError, TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                await self._resolver.addresses(parts.hostname or "", port)

    async def work(self) -> None:
        """Deliver for ever."""
        try:
            while True:
                self.wake.clear()
                now = time.time()
                for delivery in await self._stored(self._store.due_deliveries, now):
                    if delivery.id not in self._flying:
                        self._flying[delivery.id] = asyncio.create_task(self._deliver(delivery))
                due = await self._stored(self._store.next_delivery, now)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if due is None else max(0.0, due - time.time())):
                        await self.wake.wait()
        finally:
            for task in self._flying.values():
                task.cancel()
            self._resolver.close()

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            async with self._room:
                at, started = time.time(), time.monotonic()
                status, error = await self._attempt(delivery, int(at))
                seconds = time.monotonic() - started
            tried = len(delivery.attempts) + 1
            state, pause = _afterwards(status, tried)
            event(
                "webhook", level=logging.INFO if state == "delivered" else logging.WARNING, job=delivery.job,
                id=delivery.id, attempt=tried, status=status, error=error, state=state, seconds=seconds,
            )  # fmt: skip
            await self._stored(
                self._store.attempted, delivery.id, state, at=at, seconds=seconds, status=status, error=error,
                next=None if pause is None else time.time() + pause,
            )  # fmt: skip
        finally:
            del self._flying[delivery.id]
            self.wake.set()

    async def _attempt(self, delivery: Delivery, timestamp: int) -> tuple[int | None, str | None]:
        """The status of the answer and what went wrong."""
        if not self.secrets:
            return None, "the server has no webhook secret any more"
        try:
            async with asyncio.timeout(TIMEOUT):
                status = await self._post(delivery, timestamp)
        except (TimeoutError, httpcore2.TimeoutException):
            return None, f"no answer within {TIMEOUT:g} s"
        except Refused as error:
            return None, f"the address is refused: {error}"
        except (socket.gaierror, UnicodeError) as error:
            return None, f"the host's name cannot be resolved: {error}"
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            return None, str(error) or type(error).__name__
        except Exception as error:  # recorded, or it would be tried for ever
            logger.exception("webhook_failed")
            return None, type(error).__name__
        if 200 <= status < 300:
            return status, None
        return status, "redirects are not followed" if 300 <= status < 400 else "not accepted"

    async def _post(self, delivery: Delivery, timestamp: int) -> int:
        if self._tls is None and delivery.url.startswith("https:"):
            self._tls = await asyncio.to_thread(httpcore2.default_ssl_context)
        headers: dict[bytes | str, bytes | str] = {
            "content-type": "application/json",
            "user-agent": f"voicegate/{__version__}",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self.secrets, delivery.id, timestamp, delivery.body),
        }
        async with (
            httpcore2.AsyncConnectionPool(
                ssl_context=self._tls, network_backend=_CheckedNetwork(self._resolver)
            ) as pool,
            pool.stream("POST", delivery.url, headers=headers, content=delivery.body) as response,
        ):
            size = 0
            async for data in response.aiter_stream():
                size += len(data)
                if size > ANSWER_BYTES:
                    break
            return response.status


def _afterwards(status: int | None, tried: int) -> tuple[str, float | None]:
    """The delivery's state after `tried` attempts, and the seconds until the next one."""
    if status is not None and 200 <= status < 300:
        return "delivered", None
    # 410 is how a receiver says that it wants no more of them.
    if status == 410 or tried > len(PAUSES):
        return "failed", None
    return "pending", PAUSES[tried - 1]
