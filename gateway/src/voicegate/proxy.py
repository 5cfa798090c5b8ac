"""What voicegate does not do itself goes to the upstream as it came: speech output, chat, its own API."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import httpx2
from fastapi import Request
from starlette.responses import Response, StreamingResponse

from voicegate import errors
from voicegate.http import chunks, unless_disconnected
from voicegate.logs import request_id
from voicegate.settings import Settings
from voicegate.uploads import MIB

CONNECT_TIMEOUT = 5.0  # seconds
# Between two neighbours, or made anew here (RFC 9110, 7.6.1). The key is ours to check and theirs to have.
_NOT_PASSED = frozenset(
    ("authorization", "connection", "content-length", "host", "keep-alive", "proxy-authenticate",
     "proxy-authorization", "server", "date", "te", "trailer", "transfer-encoding", "upgrade", "x-request-id")
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class Proxy:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._url = settings.upstream.rstrip("/").removesuffix("/v1")
        self._client = httpx2.AsyncClient(
            base_url=self._url,
            timeout=httpx2.Timeout(settings.upstream_timeout, connect=CONNECT_TIMEOUT),
            trust_env=False,
        )

    async def pass_on(self, request: Request) -> Response:
        """The upstream's answer with its status, piece by piece."""
        length = request.headers.get("content-length", "")
        empty = request.method == "GET" or (request.method == "DELETE" and not length)
        path, query = request.scope["raw_path"].decode("ascii"), request.scope["query_string"].decode("ascii")
        headers = [(name, value) for name, value in request.headers.items() if name not in _NOT_PASSED]
        headers += [("x-request-id", request_id.get()), *([("content-length", length)] if length else [])]
        if self._settings.upstream_api_key:
            headers.append(("authorization", f"Bearer {self._settings.upstream_api_key}"))
        asked = self._client.build_request(
            request.method,
            f"{self._url}{path}{'?' if query else ''}{query}",
            headers=headers,
            content=None if empty else self._limited(request),
        )
        sending = self._client.send(asked, stream=True)
        try:
            # While a body comes in, it is its reader who sees the client go.
            answer = await (unless_disconnected(request, sending) if empty else sending)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise errors.engine_unreachable(self._url) from error
        except httpx2.TimeoutException as error:
            raise errors.engine_timeout(self._settings.upstream_timeout) from error
        except httpx2.HTTPError as error:
            raise errors.engine_down() from error
        response = StreamingResponse(_pieces(answer), answer.status_code)
        for name, value in answer.headers.multi_items():
            if name.lower() not in _NOT_PASSED or name.lower() == "content-length":
                response.headers.append(name, value)
        return response

    async def _limited(self, request: Request) -> AsyncGenerator[bytes, None]:
        size = 0
        async for part in chunks(request):
            size += len(part)
            if size > self._settings.max_upload_mib * MIB:
                raise errors.too_large(self._settings.max_upload_mib)
            yield part


async def _pieces(answer: httpx2.Response) -> AsyncGenerator[bytes, None]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()
