"""What the server says about itself: /health, /ready, /status, /metrics."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from voicegate import __version__, openapi
from voicegate.engine import Engine
from voicegate.errors import ApiError
from voicegate.metrics import CONTENT_TYPE, GpuReader, Metrics
from voicegate.models import ModelName
from voicegate.settings import Settings

PACKAGES = ("av", "ctranslate2", "fastapi", "faster-whisper", "uvicorn")
_WORDS = {"loaded": "ok", "unloaded": "ok", "reloading": "ok", "loading": "loading", "failed": "error"}


def add_routes(
    app: FastAPI,
    settings: Settings,
    model: ModelName,
    engine: Engine,
    metrics: Metrics,
    gpu: GpuReader | None,
) -> None:
    started = time.time()
    versions = {"voicegate": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }

    async def health() -> Response:
        status = engine.status()
        body = {
            "status": _WORDS[status.state],
            "model": model.id,
            "engine": status.engine,
            "version": __version__,
            "device": status.device,
            "compute_type": status.compute_type,
            "compute_type_requested": settings.compute_type,
            "load_state": status.state,
            "queue": {"waiting": status.waiting, "running": status.running, "limit": status.queue_limit},
            "language": settings.language or None,
            "ttl": settings.ttl,
        }
        if status.error:
            body["error"] = status.error
        return JSONResponse(body, 200 if _WORDS[status.state] == "ok" else 503)

    async def ready() -> Response:
        state = engine.status().state
        if _WORDS[state] != "ok":
            return JSONResponse({"ready": False, "reason": f"model_{state}"}, 503, {"Retry-After": "5"})
        try:
            engine.check_room()
        except ApiError as error:
            return JSONResponse({"ready": False, "reason": error.code}, 503, error.headers)
        return JSONResponse({"ready": True, "reason": None})

    async def status() -> Response:
        now = engine.status()
        able = engine.capabilities()
        card = gpu() if gpu else None
        body: dict[str, Any] = {
            "status": _WORDS[now.state],
            "started_at": int(started),
            "uptime_seconds": round(time.time() - started, 3),
            "versions": versions,
            "engine": {
                "name": now.engine,
                "load_state": now.state,
                "device": now.device,
                "compute_type": now.compute_type,
                "compute_type_requested": settings.compute_type,
                "error": now.error,
            },
            "models": [
                {
                    "id": model.id,
                    "tasks": list(able.tasks) if able else None,
                    "languages": list(able.languages) if able else None,
                    "words": able.words if able else None,
                }
            ],
            "queue": {"waiting": now.waiting, "running": now.running, "limit": now.queue_limit},
            "gpu": None if card is None else dataclasses.asdict(card),
        }
        return JSONResponse(body)

    async def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    app.add_api_route("/health", health, methods=["GET"], **openapi.HEALTH)
    app.add_api_route("/ready", ready, methods=["GET"], **openapi.READY)
    app.add_api_route("/status", status, methods=["GET"], **openapi.STATUS)
    app.add_api_route("/metrics", numbers, methods=["GET"], **openapi.METRICS)
