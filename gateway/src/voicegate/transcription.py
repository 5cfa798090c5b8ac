"""A request for a transcription: what its form asks, and the answer in the form it wants."""

from __future__ import annotations

from dataclasses import dataclass, replace

from starlette.responses import JSONResponse, PlainTextResponse, Response

from voicegate import errors, formats, languages, live, subtitles
from voicegate.ears_wire import FORMATS, PCM_RATES, RATE, Turn
from voicegate.engine import Info, Options, Segment, Source, Task
from voicegate.models import ModelName
from voicegate.settings import Settings
from voicegate.uploads import Form

GRANULARITIES = ("segment", "word")
SUBTITLES = ("srt", "vtt")
TRANSCRIPTS = (*formats.FORMATS, formats.DIARIZED)
RESULTS = ("json", "text", "txt", "srt", "vtt", "verbose_json", formats.DIARIZED)  # of a job


@dataclass(frozen=True)
class Asked:
    """A transcription request, checked."""

    upload: Source
    options: Options
    response_format: str
    granularities: tuple[str, ...]
    stream: bool
    layout: subtitles.Layout | None = None

    @property
    def diarized(self) -> bool:
        """Whether speakers are to be told apart."""
        return self.response_format == formats.DIARIZED


def parse_subtitles(form: Form, task: Task, model: ModelName, settings: Settings) -> Asked:
    """The request for subtitles in `form`: srt (default) or vtt, and how they are laid out."""
    asked = parse(form, _task(form, task), model, settings, SUBTITLES)
    return replace(asked, stream=False, layout=_layout(form), options=replace(asked.options, words=True))


def parse_job(form: Form, model: ModelName, settings: Settings) -> Asked:
    """The request for a job: nobody reads a stream, and the format of the result may still be changed.

    So times of words are found unless `timestamp_granularities` leaves them out.
    """
    asked = parse(form, _task(form, "transcribe"), model, settings, RESULTS)
    granularities = asked.granularities if form.list("timestamp_granularities") else GRANULARITIES
    return replace(
        asked, stream=False, layout=_layout(form), granularities=granularities,
        options=replace(asked.options, words=asked.diarized or "word" in granularities),
    )  # fmt: skip


@dataclass(frozen=True)
class LiveAsked:
    """What a live session asks for, checked."""

    asked: live.Asked
    format: str
    rate: int  # of pcm16, in Hz
    turn: Turn | None


def parse_live(form: Form, model: ModelName, settings: Settings) -> LiveAsked:
    """The query of a live session; ApiError names what is wrong."""
    requested = form.get("model")
    known = model.matches(requested)
    if not known and not settings.upstream:
        raise errors.unknown_model(requested, [model.id])
    options = Options(
        task=_task(form, "transcribe"),
        language=_language(form, settings),
        prompt=form.get("prompt") or None,
        temperature=_temperature(form.get("temperature")),
        words=_boolean(form.get("words"), "words"),
        hotwords=form.get("hotwords") or None,
        model="" if known else requested,
    )
    turn: Turn | None = Turn(
        threshold=_number(form, "threshold", Turn.threshold, 0.05, 0.95),
        silence=int(_number(form, "silence_ms", Turn.silence, 100, 10_000)),
        prefix=int(_number(form, "prefix_ms", Turn.prefix, 0, 2000)),
    )
    partials = _number(form, "partials", live.Asked.partials, 0, 60)
    if not _boolean(form.get("vad") or "true", "vad"):
        turn, partials = None, 0.0  # it may be silence, which is not for the engine
    return LiveAsked(
        live.Asked(options, partials),
        _one_of("format", form.get("format") or FORMATS[0], FORMATS),
        int(_number(form, "rate", RATE, PCM_RATES.start, PCM_RATES.stop - 1)),
        turn,
    )


def result_as(asked: Asked, query: Form) -> Asked:
    """What was asked for, with what a query says about the form of the result."""
    if query.list("timestamp_granularities"):
        asked = replace(asked, granularities=_granularities(query))
    response_format = query.get("format") or query.get("response_format")
    if response_format:
        asked = replace(asked, response_format=_one_of("format", response_format, RESULTS))
    return replace(asked, layout=_layout(query, asked.layout))


def _task(form: Form, default: Task) -> Task:
    given = form.get("task")
    if given not in ("", "transcribe", "translate"):
        raise errors.invalid(
            f"Invalid value for task: '{given}'. Supported values are: 'transcribe', 'translate'.",
            "task",
            "invalid_value",
        )
    return "translate" if given == "translate" else default


def _layout(form: Form, default: subtitles.Layout | None = None) -> subtitles.Layout:
    default = default or subtitles.Layout()
    return subtitles.Layout(
        int(_number(form, "max_line_chars", default.line_chars, 10, 200)),
        int(_number(form, "max_lines", default.lines, 1, 4)),
        _number(form, "max_chars_per_second", default.cps, 0, 100),
    )


def _one_of(param: str, value: str, kinds: tuple[str, ...]) -> str:
    if value not in kinds:
        raise errors.invalid(
            f"Invalid value for {param}: '{value}'. Supported values are: {_quoted(kinds)}.",
            param,
            "invalid_value",
        )
    return value


def _granularities(form: Form) -> tuple[str, ...]:
    found = tuple(form.list("timestamp_granularities"))
    return tuple(_one_of("timestamp_granularities", value, GRANULARITIES) for value in found) or ("segment",)


def _number(form: Form, param: str, default: float, low: float, high: float) -> float:
    text = form.get(param)
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise errors.invalid(
            f"Invalid value for {param}: '{text}'. It must be a number from {low} to {high}.",
            param,
            "invalid_value",
        )
    return value


def parse(
    form: Form,
    task: Task,
    model: ModelName,
    settings: Settings,
    kinds: tuple[str, ...] = TRANSCRIPTS,
) -> Asked:
    """The request in `form`; ApiError names what is wrong. The first of `kinds` is the default format."""
    requested = form.get("model")
    known = model.matches(requested)
    if not known and not settings.upstream:
        raise errors.unknown_model(requested, [model.id])
    if form.upload is None:
        raise errors.missing("file")
    if form.upload.size == 0:
        raise errors.bad_audio("it is empty")
    response_format = _response_format(form, task, settings, kinds)
    granularities = _granularities(form)
    stream = task == "transcribe" and _boolean(form.get("stream"), "stream")
    if stream and response_format not in ("json", "text"):
        raise errors.invalid(
            f"A stream of events cannot carry response_format '{response_format}'; use 'json'.",
            "response_format",
            "invalid_value",
        )
    words = response_format == formats.DIARIZED or (
        "word" in granularities and (stream or response_format == "verbose_json")
    )
    options = Options(
        task=task,
        language=_language(form, settings),
        prompt=form.get("prompt") or None,
        temperature=_temperature(form.get("temperature")),
        words=words,
        hotwords=form.get("hotwords") or None,
        model="" if known else requested,
    )
    return Asked(form.upload, options, response_format, granularities, stream)


def _response_format(form: Form, task: Task, settings: Settings, kinds: tuple[str, ...]) -> str:
    asked = form.get("response_format") or kinds[0]
    if asked == formats.DIARIZED and settings.diarization == "off":
        raise errors.no_diarization()
    for param in ("known_speaker_names", "known_speaker_references"):
        if form.list(param):
            raise errors.invalid(
                f"This server does not know speakers by name; leave {param} out. It calls them A, B, …",
                param,
                "known_speakers_unsupported",
            )
    if settings.diarization == "off" or task == "translate":
        kinds = tuple(kind for kind in kinds if kind != formats.DIARIZED)
    return _one_of("response_format", asked, kinds)


def _language(form: Form, settings: Settings) -> str | None:
    given = form.get("language")
    if not given:
        return settings.language or None
    if given.casefold() == "auto":
        return None
    code = languages.code_of(given)
    if code is None:
        raise errors.invalid(
            f"Language '{given}' is not supported. Give an ISO-639-1 code such as 'en' or 'de'.",
            "language",
            "unsupported_language",
        )
    return code


def _temperature(text: str) -> float:
    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise errors.invalid(
            f"Invalid value for temperature: '{text}'. It must be a number between 0 and 1.",
            "temperature",
            "invalid_value",
        )
    return value


def _boolean(text: str, param: str) -> bool:
    if text.lower() in ("", "false", "0", "null", "none"):
        return False
    if text.lower() in ("true", "1"):
        return True
    raise errors.invalid(
        f"Invalid value for {param}: '{text}'. It must be true or false.", param, "invalid_value"
    )


def _quoted(values: tuple[str, ...]) -> str:
    return ", ".join(f"'{value}'" for value in values)


def answer(asked: Asked, info: Info, segments: list[Segment]) -> Response:
    """All of it in the format asked for."""
    match asked.response_format:
        case "text" | "txt":
            return PlainTextResponse(formats.as_text(segments))
        case "srt":
            text = subtitles.as_srt(segments, asked.layout) if asked.layout else formats.as_srt(segments)
            return PlainTextResponse(text, media_type="application/x-subrip; charset=utf-8")
        case "vtt":
            text = subtitles.as_vtt(segments, asked.layout) if asked.layout else formats.as_vtt(segments)
            return PlainTextResponse(text, media_type="text/vtt; charset=utf-8")
        case "verbose_json":
            return JSONResponse(
                formats.as_verbose_json(
                    segments,
                    info,
                    with_segments="segment" in asked.granularities,
                    with_words="word" in asked.granularities,
                )
            )
        case formats.DIARIZED:
            if info.turns is None:
                raise errors.not_diarized()
            return JSONResponse(formats.as_diarized_json(segments, info))
        case _:
            body = formats.as_json(segments, info)
            if info.task == "translate":
                del body["usage"]
            return JSONResponse(body)
