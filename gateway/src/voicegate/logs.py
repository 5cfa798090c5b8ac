"""One line per event, `key=value`, never a word of what was said."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

request_id: ContextVar[str] = ContextVar("request_id", default="")

logger = logging.getLogger("voicegate")

FORMATS = ("text", "json")
observers: list[Callable[[str, dict[str, Any]], None]] = []  # told of every event, logged or not


def event(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log `name` with its fields and the id of the request it belongs to."""
    for observe in observers:
        observe(name, fields)
    if logger.isEnabledFor(level):
        logger.log(level, name, extra={"fields": fields})


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO model_loaded seconds=0.15 device=cpu`"""

    def format(self, record: logging.LogRecord) -> str:
        parts = [_when(record), record.levelname, _text(record.getMessage(), plain=True)]
        parts += [f"{key}={_text(value)}" for key, value in _fields(self, record).items()]
        return " ".join(parts)


class JsonFormatter(logging.Formatter):
    """`{"time": "2026-01-31T12:00:00.000Z", "level": "INFO", "event": "model_loaded", "seconds": 0.15}`"""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _when(record), "level": record.levelname, "event": record.getMessage()}
        return json.dumps(_fields(self, record) | line, ensure_ascii=False, default=str)


def _when(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _fields(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    if (current := request_id.get()) and "request_id" not in fields:
        fields["request_id"] = current
    if record.name.partition(".")[0] != "voicegate":
        fields["logger"] = record.name
    if record.exc_info:
        fields["traceback"] = formatter.formatException(record.exc_info)
    return {key: value for key, value in fields.items() if value is not None}


def _text(value: Any, *, plain: bool = False) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    if "\n" in text or "\r" in text or (not plain and (text == "" or any(c in ' "=' for c in text))):
        return json.dumps(text, ensure_ascii=False)
    return text


def configure(level: str, form: str = "text") -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers[:] = []
        logging.getLogger(name).propagate = True
    # The multipart parser and the decoder describe every packet at debug level: of no use, and private.
    for name in ("python_multipart", "libav", "faster_whisper"):
        logging.getLogger(name).setLevel(logging.WARNING)
