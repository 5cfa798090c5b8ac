"""One line per event, `key=value`, never a word of what was said."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

request_id: ContextVar[str] = ContextVar("request_id", default="")

logger = logging.getLogger("voicegate")


def event(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log `name` with its fields and the id of the request it belongs to."""
    if logger.isEnabledFor(level):
        logger.log(level, name, extra={"fields": fields})


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO model_loaded seconds=0.15 device=cpu`"""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        if (current := request_id.get()) and "request_id" not in fields:
            fields["request_id"] = current
        if record.name.partition(".")[0] != "voicegate":
            fields["logger"] = record.name
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        parts = [when, record.levelname, _text(record.getMessage(), plain=True)]
        parts += [f"{key}={_text(value)}" for key, value in fields.items() if value is not None]
        return " ".join(parts)


def _text(value: Any, *, plain: bool = False) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    if "\n" in text or "\r" in text or (not plain and (text == "" or any(c in ' "=' for c in text))):
        return json.dumps(text, ensure_ascii=False)
    return text


def configure(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
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
