"""API keys: who may ask, and how much. The server knows hashes only."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from voicegate import errors

if TYPE_CHECKING:
    from voicegate.settings import Settings

WINDOW = 60.0  # seconds that `per_minute` looks back
_NAME = re.compile(r"^[A-Za-z0-9][\w.-]{0,63}$", re.ASCII)
_DIGEST = re.compile(r"^[0-9a-f]{64}$")
LIMITS = ("per_minute", "concurrent")


@dataclass(frozen=True)
class Key:
    name: str
    digest: str  # SHA-256 in hex. A random key needs no slow hash: there is nothing to guess.
    per_minute: int = 0  # 0: no limit
    concurrent: int = 0


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def create(name: str) -> tuple[str, str]:
    """A new key, and its line for the file of keys. ValueError if the name will not do."""
    _check_name(name)
    key = f"vg-{secrets.token_urlsafe(32)}"
    return key, f"{name}:{digest(key)}"


def parse(text: str) -> tuple[Key, ...]:
    """Lines `NAME:SHA256[:LIMIT=NUMBER,…]`; `#` begins a comment. ValueError names every bad line."""
    keys: list[Key] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            key = _parse_line(line)
            if any(key.name == other.name or key.digest == other.digest for other in keys):
                raise ValueError(f"the name {key.name} or its key is there twice")
            keys.append(key)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(keys)


def _parse_line(line: str) -> Key:
    name, _, rest = line.partition(":")
    hashed, _, limits = rest.partition(":")
    _check_name(name)
    if not _DIGEST.match(hashed.lower()):
        raise ValueError("after the name there must be a SHA-256 of 64 hex digits (see 'voicegate key')")
    values: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in limits.split(","))):
        limit, _, count = item.partition("=")
        if limit not in LIMITS or not count.isdecimal() or int(count) < 1:
            raise ValueError(f"{item!r} is no limit; known are {', '.join(f'{x}=NUMBER' for x in LIMITS)}")
        values[limit] = int(count)
    return Key(name, hashed.lower(), **values)


def _check_name(name: str) -> None:
    if not _NAME.match(name):
        raise ValueError("a key's name is 1 to 64 letters, digits and . _ -")
    if name == "default":
        raise ValueError("the name default is that of the single key (--api-key-file)")


def read(path: str) -> tuple[Key, ...]:
    """The keys in a file; ValueError or OSError says what is wrong."""
    keys = parse(Path(path).read_text(encoding="utf-8"))
    if not keys:
        raise ValueError("it holds no key; make one with: voicegate key NAME")
    return keys


def from_settings(settings: Settings) -> Keys:
    """The keys of the file, and the single one, which is called `default`."""
    known = read(settings.api_keys_file) if settings.api_keys_file else ()
    if settings.api_key:
        known += (Key("default", digest(settings.api_key)),)
    return Keys(known)


class Keys:
    """Who may ask now. Without any key everybody may."""

    def __init__(self, keys: tuple[Key, ...], clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._clock = clock
        self._recent: dict[str, deque[float]] = {key.name: deque() for key in keys}
        self._running: dict[str, int] = dict.fromkeys(self._recent, 0)

    @property
    def needed(self) -> bool:
        return bool(self._keys)

    def find(self, authorization: bytes) -> Key | None:
        """Whose header `Authorization: Bearer KEY` this is; None while no key is needed. ApiError (401)."""
        if not self._keys:
            return None
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() == b"bearer":
            hashed = hashlib.sha256(given.strip()).hexdigest()
            for key in self._keys:
                if hmac.compare_digest(hashed, key.digest):
                    return key
        raise errors.unauthorized(given=bool(authorization))

    @contextmanager
    def work(self, key: Key | None) -> Iterator[None]:
        """While a request of `key` is worked on. ApiError (429) when that is more than its limits allow."""
        if key is None:
            yield
            return
        now = self._clock()
        recent = self._recent[key.name]
        while recent and recent[0] <= now - WINDOW:
            recent.popleft()
        if key.per_minute and len(recent) >= key.per_minute:
            wait = math.ceil(recent[0] + WINDOW - now)
            raise errors.key_limit(f"{key.per_minute} requests a minute", max(1, wait))
        if key.concurrent and self._running[key.name] >= key.concurrent:
            raise errors.key_limit(f"{key.concurrent} requests at the same time", 1)
        if key.per_minute:
            recent.append(now)
        self._running[key.name] += 1
        try:
            yield
        finally:
            self._running[key.name] -= 1
