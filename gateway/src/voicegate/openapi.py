"""What /openapi.json says about the routes, whose forms are read by hand and so not known to FastAPI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from voicegate.formats import DIARIZED, FORMATS

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required or properties)}


def _nullable(kind: str) -> Schema:
    return {"type": [kind, "null"]}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}

_WORD = _object(word=_TEXT, start=_NUMBER, end=_NUMBER)
_QUEUE = _object(waiting=_COUNT, running=_COUNT, limit=_COUNT)
_STATE: Schema = {"type": "string", "enum": ["loading", "loaded", "unloaded", "reloading", "failed"]}

SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        error=_object(message=_TEXT, type=_TEXT, param=_nullable("string"), code=_nullable("string"))
    ),
    "Usage": _object(type={"const": "duration"}, seconds=_COUNT),
    "Word": _WORD,
    "Segment": _object(
        id=_COUNT, seek=_COUNT, start=_NUMBER, end=_NUMBER, text=_TEXT, tokens=_array(_COUNT),
        temperature=_NUMBER, avg_logprob=_NUMBER, compression_ratio=_NUMBER, no_speech_prob=_NUMBER,
    ),
    "Transcription": _object(("text",), text=_TEXT, usage=ref("Usage")),
    "VerboseTranscription": _object(
        ("task", "language", "duration", "text", "usage"),
        task={"enum": ["transcribe", "translate"]}, language=_TEXT, duration=_NUMBER, text=_TEXT,
        words=_array(ref("Word")), segments=_array(ref("Segment")), usage=ref("Usage"),
    ),
    "DiarizedTranscription": _object(
        task={"const": "transcribe"}, duration=_NUMBER, text=_TEXT, usage=ref("Usage"),
        segments=_array(
            _object(
                type={"const": "transcript.text.segment"}, id=_TEXT, start=_NUMBER, end=_NUMBER, text=_TEXT,
                speaker=_TEXT,
            )
        ),
    ),
    "StreamEvent": {
        "description": "One `data:` line of the stream; the last is `transcript.text.done` or an error.",
        "oneOf": [
            _object(
                ("type", "delta"), type={"const": "transcript.text.delta"}, delta=_TEXT, start=_NUMBER,
                end=_NUMBER, words=_array(ref("Word")),
            ),
            _object(
                type={"const": "transcript.text.done"}, text=_TEXT,
                usage=_object(
                    type={"const": "tokens"}, input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT,
                    input_token_details=_object(audio_tokens=_COUNT, text_tokens=_COUNT),
                ),
            ),
            ref("Error"),
        ],
    },
    "JobId": _object(id=_TEXT),
    "Job": _object(
        ("id", "object", "status", "progress", "task", "error"),
        id=_TEXT, object={"const": "job"}, progress={"type": "number", "minimum": 0, "maximum": 100},
        status={"enum": ["queued", "running", "done", "failed", "cancelled"]},
        task={"enum": ["transcribe", "translate"]}, error={"type": ["object", "null"]},
        segments=_array({"type": "object"}),
    ),
    "JobPage": _object(
        object={"const": "list"}, data=_array(ref("Job")), first_id=_nullable("string"),
        last_id=_nullable("string"), has_more={"type": "boolean"},
    ),
    "Deliveries": _object(object={"const": "list"}, data=_array({"type": "object"})),
    "Model": _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT),
    "Models": _object(object={"const": "list"}, data=_array(ref("Model"))),
    "Health": _object(
        ("status", "model", "engine", "version", "device", "load_state", "queue"),
        status={"enum": ["ok", "loading", "error"]}, model=_TEXT, engine=_TEXT, version=_TEXT, device=_TEXT,
        compute_type=_TEXT, compute_type_requested=_TEXT, load_state=_STATE, queue=_QUEUE,
        language=_nullable("string"), ttl={"type": "integer"}, error=_TEXT,
    ),
    "Ready": _object(ready={"type": "boolean"}, reason=_nullable("string")),
    "Status": _object(
        status={"enum": ["ok", "loading", "error"]}, started_at=_COUNT, uptime_seconds=_NUMBER,
        versions={"type": "object", "additionalProperties": _TEXT},
        engine=_object(
            name=_TEXT, load_state=_STATE, device=_TEXT, compute_type=_TEXT, compute_type_requested=_TEXT,
            error=_nullable("string"),
        ),
        models=_array(
            _object(
                id=_TEXT, tasks={"type": ["array", "null"], "items": _TEXT},
                languages={"type": ["array", "null"], "items": _TEXT}, words=_nullable("boolean"),
            )
        ),
        queue=_QUEUE,
        gpu={"type": ["object", "null"]},
    ),
}  # fmt: skip


def _answer(description: str, **kinds: Schema) -> Schema:
    return {
        "description": description,
        "content": {kind.replace("__", "/"): {"schema": schema} for kind, schema in kinds.items()},
    }


def _json(description: str, name: str) -> Schema:
    return _answer(description, application__json=ref(name))


def _route(
    summary: str, responses: dict[int | str, Schema], body: Schema | None = None, **more: Any
) -> dict[str, Any]:
    """Arguments for `add_api_route`. Every route can fail in OpenAI's shape."""
    extra: Schema = {"responses": {str(code): answer for code, answer in responses.items()}}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": body}}}
    errors = {"default": _json("What went wrong", "Error")}
    # A bare Response: FastAPI must not add a kind of its own to the ones named here.
    return {
        "summary": summary, "responses": errors, "openapi_extra": extra, "response_class": Response,
        "response_model": None, **more,
    }  # fmt: skip


def _form(**fields: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["file"],
        "properties": {
            "file": {
                "type": "string",
                "format": "binary",
                "description": "Audio or video in any usual container",
            },
            "model": {"type": "string", "description": "`whisper-1`, or a name that /v1/models lists"},
            **fields,
        },
    }


_SEEN: Schema = {"description": "Its end was seen: there is nothing more"}
_PROMPT = {"type": "string", "description": "Text that came before, or how names are spelled"}
_HOTWORDS = {"type": "string", "description": "Words to expect, throughout the file"}
_LANGUAGE = {"type": "string", "description": "ISO-639-1 code, English name, or `auto`"}
_TEMPERATURE = {"type": "number", "minimum": 0, "maximum": 1}
_KIND = {"type": "string", "enum": list(FORMATS), "default": "json"}
_KIND_OF_TRANSCRIPT = {**_KIND, "enum": [*FORMATS, DIARIZED]}
_TRANSCRIPT = {
    **_answer(
        "The transcript in the format asked for",
        application__json={
            "anyOf": [ref("VerboseTranscription"), ref("DiarizedTranscription"), ref("Transcription")]
        },
        text__plain=_TEXT,
        text__vtt=_TEXT,
        text__event_stream=ref("StreamEvent"),
    )
}
# Names that are no Python words.
_TRANSCRIPT["content"]["text/event-stream"] = _TRANSCRIPT["content"].pop("text/event_stream")
_TRANSCRIPT["content"]["application/x-subrip"] = {"schema": _TEXT}
_CUES = {
    "description": "The subtitles",
    "content": {kind: {"schema": _TEXT} for kind in ("application/x-subrip", "text/vtt")},
}

TRANSCRIPTIONS = _route(
    "Transcribe a file",
    {200: _TRANSCRIPT},
    _form(
        language=_LANGUAGE,
        prompt=_PROMPT,
        hotwords=_HOTWORDS,
        temperature=_TEMPERATURE,
        response_format=_KIND_OF_TRANSCRIPT,
        stream={"type": "boolean", "default": False},
        **{"timestamp_granularities[]": _array({"type": "string", "enum": ["segment", "word"]})},
    ),
)
TRANSLATIONS = _route(
    "Translate a file into English",
    {200: _TRANSCRIPT},
    _form(prompt=_PROMPT, hotwords=_HOTWORDS, temperature=_TEMPERATURE, response_format=_KIND),
)
SUBTITLES = _route(
    "Subtitles that people can read",
    {200: _CUES},
    _form(
        language=_LANGUAGE,
        prompt=_PROMPT,
        hotwords=_HOTWORDS,
        task={"type": "string", "enum": ["transcribe", "translate"], "default": "transcribe"},
        response_format={"type": "string", "enum": ["srt", "vtt"], "default": "srt"},
        max_line_chars={"type": "integer", "minimum": 10, "maximum": 200, "default": 42},
        max_lines={"type": "integer", "minimum": 1, "maximum": 4, "default": 2},
        max_chars_per_second={"type": "number", "minimum": 0, "maximum": 100, "default": 17},
    ),
)
_JOB: dict[int | str, Schema] = {200: _json("The job", "Job")}
JOB_NEW = _route(
    "Hand in a recording to transcribe later",
    {202: _json("Stored; Location says where the job is", "JobId"), 200: _json("Stored before", "JobId")},
    {
        "type": "object",
        "required": ["audio"],
        "properties": {
            "audio": {"type": "string", "format": "binary", "description": "Audio or video"},
            "language": _LANGUAGE,
            "task": {"type": "string", "enum": ["transcribe", "translate"], "default": "transcribe"},
            "priority": {"type": "string", "enum": ["high", "normal", "low"], "default": "normal"},
            "response_format": _KIND_OF_TRANSCRIPT,
            "prompt": _PROMPT,
            "temperature": _TEMPERATURE,
            "webhook_url": {"type": "string", "description": "Who is called when the job has ended"},
        },
    },
)
JOB_LIST = _route("Jobs, the newest first", {200: _json("A page of them", "JobPage")})
JOB = _route("How a job is", _JOB)
JOB_CANCEL = _route("Cancel a job", _JOB)
JOB_STREAM = _route(
    "A job's segments as they come",
    {200: _answer("Events", **{"text__event-stream": {"type": "object"}}), 204: _SEEN},
)
JOB_RESULT = _route(
    "The transcript of a job that is done",
    {
        200: _answer(
            "In the format asked for",
            application__json={"type": "object"},
            text__plain=_TEXT,
            text__vtt=_TEXT,
            **{"application__x-subrip": _TEXT},
        )
    },
)
JOB_DELIVERIES = _route("Calls of a job's webhook", {200: _json("All of them", "Deliveries")})
MODELS = _route("The models that are served", {200: _json("All of them", "Models")})
MODEL = _route("One model", {200: _json("It", "Model")})
HEALTH = _route(
    "Whether the server lives",
    {200: _json("Requests can be taken", "Health"), 503: _json("The model is not loaded yet", "Health")},
)
READY = _route(
    "Whether a request would be served now",
    {200: _json("It would", "Ready"), 503: _json("It would not, and why", "Ready")},
)
STATUS = _route("Engine, models, queue, versions", {200: _json("All of it", "Status")})
METRICS = _route("Metrics for Prometheus", {200: _answer("Text format 0.0.4", text__plain=_TEXT)})


def describe(app: FastAPI, key_needed: bool, open_paths: frozenset[str]) -> None:
    """Add the schemas, and the key where one is needed, to what FastAPI writes."""
    generate = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            schema = generate()
            components = schema.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **SCHEMAS}
            if key_needed:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, methods in schema["paths"].items():
                    if path not in open_paths:
                        for operation in methods.values():
                            operation["security"] = [{"key": []}]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it
