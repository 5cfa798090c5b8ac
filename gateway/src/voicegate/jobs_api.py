"""The routes under /jobs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from voicegate import errors, formats, openapi, webhook_rules
from voicegate.errors import ApiError
from voicegate.http import KEEP_ALIVE, EventStream, chunks
from voicegate.jobs import PRIORITIES, Jobs, Look, brief, described, events
from voicegate.models import ModelName
from voicegate.settings import Settings
from voicegate.store import STATUSES
from voicegate.transcription import answer, parse_job, result_as
from voicegate.uploads import Form, read_form
from voicegate.webhooks import Refused

_KEY = re.compile(r"^[\x21-\x7e][\x20-\x7e]{0,254}$")
_ID = re.compile(r"^job_[0-9a-f]{32}$")


def jobs_off() -> ApiError:
    return ApiError(
        501,
        "Jobs are off on this server. They need a folder: set --data-dir (VOICEGATE_DATA_DIR) and start it"
        " again.",
        type="server_error",
        code="jobs_off",
    )


def add_routes(app: FastAPI, settings: Settings, model: ModelName, jobs: Jobs | None) -> None:
    def on() -> Jobs:
        if jobs is None:
            raise jobs_off()
        return jobs

    async def create_job(request: Request) -> Response:
        jobs = on()
        key = request.headers.get("idempotency-key")
        if key is not None and not _KEY.match(key):
            raise errors.invalid("It must be 1 to 255 printable ASCII characters.", "Idempotency-Key")
        length = request.headers.get("content-length", "")
        if not key:  # with one, the job may have been accepted already
            await jobs.check_room(int(length) if length.isdigit() else 0)
        form = await read_form(
            request.headers.get("content-type", ""),
            length,
            chunks(request),
            limit_mib=settings.max_upload_mib,
            folder=settings.upload_dir,
            file_fields=("audio", "file"),
        )
        try:
            if form.upload is None:
                raise errors.missing("audio")
            asked = parse_job(form, model, settings)
            priority = form.get("priority") or "normal"
            if priority not in PRIORITIES:
                raise _no_such("priority", priority, tuple(PRIORITIES))
            url = form.get("webhook_url") or None
            if url is not None:
                await _check_webhook(jobs, url)
            id, known = await jobs.accept(
                asked, form.upload.size, webhook_url=url, priority=priority, key=key
            )
        finally:
            form.close()
        headers = {"Location": f"/jobs/{id}"} | ({"Idempotent-Replayed": "true"} if known else {})
        return JSONResponse({"id": id}, 202, headers=headers)

    async def list_jobs(request: Request) -> Response:
        jobs = on()
        query = _query(request)
        statuses = query.list("status")
        for status in statuses:
            if status not in STATUSES:
                raise _no_such("status", status, STATUSES)
        limit = _number(query, "limit", 1, 100)
        cursor = query.get("after") or None
        if cursor is not None and not _ID.match(cursor):
            raise errors.invalid("It must be the 'last_id' of another page.", "after", "invalid_value")
        order = query.get("order") or "desc"
        if order not in ("asc", "desc"):
            raise _no_such("order", order, ("asc", "desc"))
        size = 20 if limit is None else int(limit)
        found = await jobs.page(
            statuses=statuses, created_after=_number(query, "created_after"),
            created_before=_number(query, "created_before"), cursor=cursor, ascending=order == "asc",
            limit=size + 1,
        )  # fmt: skip
        data = [described(record, jobs.progress(record), record.info) for record in found[:size]]
        return JSONResponse(
            {
                "object": "list",
                "data": data,
                "first_id": data[0]["id"] if data else None,
                "last_id": data[-1]["id"] if data else None,
                "has_more": len(found) > size,
            }
        )

    async def get_job(id: str) -> Response:
        return JSONResponse(_whole(await on().look(id)))

    async def cancel_job(id: str) -> Response:
        return JSONResponse(_whole(await on().cancel(id)))

    async def stream_job(request: Request, id: str) -> Response:
        jobs = on()
        seen = request.headers.get("last-event-id", "")
        look = await jobs.look(id, segments=False)  # a status of its own if there is none
        if look.record.finished is not None and seen.endswith(".end"):
            # A browser's EventSource asks again after every end; this answer stops it.
            return Response(status_code=204)
        found = events(jobs, id, seen, KEEP_ALIVE)

        async def lines() -> AsyncGenerator[bytes, None]:
            async for item in found:
                if item is None:
                    yield b": waiting\n\n"
                else:
                    name, number, data = item
                    yield f"event: {name}\nid: {number}\n".encode() + formats.sse(data)

        written = lines()

        async def close() -> None:
            await written.aclose()
            await found.aclose()

        return EventStream(request, written, close)

    async def get_result(request: Request, id: str) -> Response:
        asked, info, segments = await on().result(id)
        return answer(result_as(asked, _query(request)), info, segments)

    async def list_deliveries(id: str) -> Response:
        data = [
            {
                "id": delivery.id,
                "object": "delivery",
                "event": delivery.event,
                "url": delivery.url,
                "state": delivery.state,
                "next_attempt_at": None if delivery.next is None else round(delivery.next, 3),
                "body": json.loads(delivery.body),
                "attempts": [
                    {
                        "at": round(attempt["at"], 3),
                        "seconds": round(attempt["seconds"], 3),
                        "status_code": attempt["status"],
                        "error": attempt["error"],
                    }
                    for attempt in delivery.attempts
                ],
            }
            for delivery in await on().deliveries(id)
        ]
        return JSONResponse({"object": "list", "data": data})

    app.add_api_route("/jobs", create_job, methods=["POST"], **openapi.JOB_NEW)
    app.add_api_route("/jobs", list_jobs, methods=["GET"], **openapi.JOB_LIST)
    app.add_api_route("/jobs/{id}", get_job, methods=["GET"], **openapi.JOB)
    app.add_api_route("/jobs/{id}", cancel_job, methods=["DELETE"], **openapi.JOB_CANCEL)
    app.add_api_route("/jobs/{id}/stream", stream_job, methods=["GET"], **openapi.JOB_STREAM)
    app.add_api_route("/jobs/{id}/result", get_result, methods=["GET"], **openapi.JOB_RESULT)
    app.add_api_route("/jobs/{id}/deliveries", list_deliveries, methods=["GET"], **openapi.JOB_DELIVERIES)


def _whole(look: Look) -> dict[str, Any]:
    segments = [brief(segment, number) for number, segment in enumerate(look.segments)]
    return {**described(look.record, look.progress, look.info), "segments": segments}


async def _check_webhook(jobs: Jobs, url: str) -> None:
    if not jobs.webhooks.secrets:
        raise errors.invalid(
            "Webhooks are off on this server. They need a secret: set --webhook-secret-file"
            " (VOICEGATE_WEBHOOK_SECRET_FILE) and start it again.",
            "webhook_url",
            "webhooks_off",
        )
    try:
        webhook_rules.check_url(url)
    except ValueError as error:
        raise errors.invalid(f"Invalid webhook_url: {error}.", "webhook_url", "invalid_value") from error
    try:
        await jobs.webhooks.check(url)
    except Refused as error:
        raise errors.invalid(
            f"This webhook_url cannot be called: {error} unless the server allows them (--webhook-allow,"
            " VOICEGATE_WEBHOOK_ALLOW).",
            "webhook_url",
            "webhook_forbidden",
        ) from error


def _query(request: Request) -> Form:
    """The query as a form, which it is."""
    fields: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        fields.setdefault(name, []).append(value)
    return Form(fields)


def _no_such(param: str, value: str, known: tuple[str, ...]) -> ApiError:
    names = ", ".join(f"'{name}'" for name in known)
    return errors.invalid(
        f"Invalid value for {param}: '{value}'. Supported values are: {names}.", param, "invalid_value"
    )


def _number(query: Form, param: str, low: float = 0, high: float = math.inf) -> float | None:
    """Seconds since 1970, or a count; None if it is not given."""
    text = query.get(param)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        limits = f" from {low:g} to {high:g}" if high < math.inf else ""
        raise errors.invalid(
            f"Invalid value for {param}: '{text}'. It must be a number{limits}.", param, "invalid_value"
        )
    return value
