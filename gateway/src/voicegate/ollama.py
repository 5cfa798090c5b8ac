"""What voicegate asks of Ollama: which models are loaded, to let one go, to take it back."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

MIB = 1024 * 1024
ASK_TIMEOUT = 5.0  # seconds
LOAD_TIMEOUT = 300.0
# keep_alive -1 is kept by Ollama as a time some centuries away.
FOR_EVER = 10 * 365 * 86400.0
_FRACTION = re.compile(r"\.(\d{6})\d*")


class OllamaError(Exception):
    """It is not there, or its answer cannot be used. The message says what was asked; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Loaded:
    """A model in Ollama's memory."""

    name: str
    digest: str
    size_mib: int
    vram_mib: int
    remaining: float  # seconds until it is let go; math.inf: never

    @property
    def on_cpu_mib(self) -> int:
        """What did not fit on the card. It stays there until the model is loaded again."""
        return max(0, self.size_mib - self.vram_mib)

    @property
    def busy(self) -> bool:
        """Past its time and still there: a request is being worked on.

        Ollama moves the time on only when a request ends, so a model within it may be busy as well. That does
        no harm: a model that is asked to go while it works goes when it has answered.
        """
        return self.remaining <= 0


class Ollama:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # No connection stays open: whoever looks for work at Ollama's port would take it for some.
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            timeout=ASK_TIMEOUT,
            limits=httpx2.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def loaded(self) -> list[Loaded]:
        answer = await self._ask("GET", "/api/ps")
        now = datetime.datetime.now(datetime.UTC)
        try:
            return [read_loaded(item, now) for item in answer.get("models") or []]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OllamaError(f"{self.url}/api/ps: {type(error).__name__}: {error}") from error

    async def unload(self, name: str) -> None:
        """Let it go: at once if it does nothing, else when it has answered. No request is lost."""
        await self._ask("POST", "/api/generate", {"model": name, "keep_alive": 0, "stream": False})

    async def load(self, name: str, remaining: float) -> None:
        """Load it, for as long as it would have stayed."""
        keep = -1 if math.isinf(remaining) else max(1, round(remaining))
        body = {"model": name, "keep_alive": keep, "stream": False}
        try:
            await self._ask("POST", "/api/generate", body, timeout=LOAD_TIMEOUT)
        except OllamaError as error:
            if error.status != 400:
                raise
            # A model that only makes embeddings cannot generate.
            body = {"model": name, "keep_alive": keep, "input": []}
            await self._ask("POST", "/api/embed", body, timeout=LOAD_TIMEOUT)

    async def _ask(self, method: str, path: str, body: Any = None, timeout: float = ASK_TIMEOUT) -> Any:
        try:
            response = await self._client.request(method, path, json=body, timeout=timeout)
            response.raise_for_status()
            answer = response.json()
        except httpx2.HTTPStatusError as error:
            status = error.response.status_code
            raise OllamaError(f"{self.url}{path}: status {status}", status) from error
        except (httpx2.HTTPError, ValueError) as error:
            raise OllamaError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        if not isinstance(answer, dict):
            raise OllamaError(f"{self.url}{path}: the answer is no object")
        return answer


def read_loaded(item: Mapping[str, Any], now: datetime.datetime) -> Loaded:
    """One entry of /api/ps. KeyError, TypeError or ValueError if it is none."""
    # Go writes nanoseconds; Python reads at most microseconds.
    until = datetime.datetime.fromisoformat(_FRACTION.sub(r".\1", str(item["expires_at"])))
    remaining = (until - now).total_seconds()
    return Loaded(
        name=str(item["name"]),
        digest=str(item.get("digest") or ""),
        size_mib=int(item["size"]) // MIB,
        vram_mib=int(item["size_vram"]) // MIB,
        remaining=math.inf if remaining > FOR_EVER else remaining,
    )
