"""An engine that is a server of its own: any that speaks OpenAI's audio API (Speaches, whisper.cpp, vLLM)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx2

from voicegate import errors, languages, models
from voicegate.engine import Capabilities, Info, LoadState, Options, Rank, Segment, Source, Status, Word
from voicegate.errors import ApiError
from voicegate.logs import event, request_id
from voicegate.peace import Peace
from voicegate.settings import Settings
from voicegate.speaches import SpeachesTenant, Unreachable
from voicegate.worker import Job, OneStep, Worker, stream

CONNECT_TIMEOUT = 5.0  # seconds
PROBE_TIMEOUT = 5.0
# Seconds between two questions whether it is there: while it is not, while it is.
PROBE_PAUSES = (0.5, 10.0)
# Seconds that a request waits for an engine that is being restarted.
PATIENCE = 10.0
CHUNK = 256 * 1024
# A transcript of the longest audio with all its words stays far below.
ANSWER_LIMIT = 256 * 1024 * 1024


class UpstreamEngine:
    """Whole files, as many at once as it takes; what one says comes when the upstream has all of it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._url = address(settings)
        self._model = settings.upstream_model or models.resolve(settings.model).id
        self._client = client(settings)
        self._worker = Worker(settings.queue_limit, parallel=settings.upstream_parallel, live_beyond=True)
        self._state: LoadState = "loading"
        self._error: str | None = None
        self._there = asyncio.Event()
        self._probing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.peace = Peace.of(settings)
        self._tenant = (
            None if self.peace is None else SpeachesTenant(settings, self.peace, self._client, self._model)
        )

    async def start(self) -> None:
        """Never fails: an upstream that is not there yet may come."""
        if self._tenant is not None:
            self._tenant.watch()
        self._probing = asyncio.create_task(self._probe())
        await self._there.wait()

    async def stop(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probing
        await self._worker.close()
        if self._tenant is not None:
            await self._tenant.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    def status(self) -> Status:
        away = self._tenant is not None and self._tenant.away
        return Status(
            engine=f"upstream {self._url}",
            state="unloaded" if away and self._state == "loaded" else self._state,
            device="upstream",
            compute_type="upstream",
            waiting=self._worker.waiting,
            running=self._worker.running,
            queue_limit=self._worker.limit,
            error=self._error,
        )

    def capabilities(self) -> Capabilities | None:
        return Capabilities(("transcribe", "translate"), tuple(languages.NAMES), words=True)

    def check_room(self) -> None:
        self._worker.check_room()

    async def transcribe(
        self, source: Source, options: Options, rank: Rank = Rank.INTERACTIVE, client: str = ""
    ) -> AsyncGenerator[Info | Segment, None]:
        def make(job: Job[Info | Segment]) -> OneStep:
            return OneStep(lambda: self._transcribe(job, source, options))

        # Also while it waits for its turn: between two requests nobody is idle.
        at_work = contextlib.nullcontext() if self._tenant is None else self._tenant.at_work()
        with at_work:
            async with contextlib.aclosing(stream(self._worker, make, rank, client)) as items:
                async for item in items:
                    yield item

    async def _transcribe(self, job: Job[Info | Segment], source: Source, options: Options) -> None:
        sent = asyncio.Event()
        asking = asyncio.create_task(self._ask(source, options, sent))
        leaving = asyncio.create_task(job.cancelled.wait())
        try:
            await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return  # closing the connection is what tells an upstream
            for item in read_answer(asking.result(), options):
                job.emit(item)
        finally:
            leaving.cancel()
            if self._tenant is not None and sent.is_set():
                # It works on that whether somebody listens or not: its model is in use until it answers.
                self._keep(asking)
            else:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        def done(task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # nobody is left to hear it

        self._tasks.add(task)
        task.add_done_callback(done)

    async def _ask(self, source: Source, options: Options, sent: asyncio.Event) -> dict[str, Any]:
        model = self._model_for(options)
        route = "translations" if options.task == "translate" else "transcriptions"
        deadline: float | None = None  # from when it could not be reached; waiting for room is no part of it
        while True:
            using = contextlib.nullcontext() if self._tenant is None else self._tenant.using(model)
            try:
                async with using:
                    return await self._post(f"/v1/audio/{route}", source.descriptor(), options, sent)
            except Unreachable as error:
                self._note(str(error))
                now = asyncio.get_running_loop().time()
                deadline = deadline or now + PATIENCE
                if now > deadline:
                    raise errors.engine_unreachable(self._url) from error
                await asyncio.sleep(PROBE_PAUSES[0])

    def _model_for(self, options: Options) -> str:
        return options.model or (self._settings.live_model if options.draft else "") or self._model

    async def _post(
        self, path: str, descriptor: int, options: Options, sent: asyncio.Event
    ) -> dict[str, Any]:
        form = fields(self._model_for(options), options)
        body, length, content_type = multipart(form, descriptor, sent)
        headers = {"content-type": content_type, "content-length": str(length)}
        if current := request_id.get():
            headers["x-request-id"] = current
        try:
            async with self._client.stream("POST", path, content=body, headers=headers) as response:
                data = bytearray()
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > ANSWER_LIMIT:
                        raise errors.engine_answer("it is too long")
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        except httpx2.TimeoutException as error:
            raise errors.engine_timeout(self._settings.upstream_timeout) from error
        except httpx2.HTTPError as error:  # it went away in the middle
            self._note(f"{type(error).__name__}: {error}")
            raise errors.engine_down() from error
        if response.status_code == 404 and options.model:
            raise errors.unknown_model(options.model, [self._model])
        if response.status_code >= 300:
            raise refused(response.status_code, bytes(data), self._model, response.headers.get("retry-after"))
        self._note(None)
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise errors.engine_answer("it is no JSON") from error
        if not isinstance(answer, dict):
            raise errors.engine_answer("it is no object")
        return answer

    # -- whether it is there

    async def _probe(self) -> None:
        there = False
        while True:
            self._note(await self._problem())
            if self._tenant is not None and self._error is None and not there:
                self._keep(asyncio.create_task(self._tenant.arrive()))
            there = self._error is None
            await asyncio.sleep(PROBE_PAUSES[self._error is None])

    async def _problem(self) -> str | None:
        try:
            response = await self._client.get("/v1/models", timeout=PROBE_TIMEOUT)
        except httpx2.HTTPError as error:
            return f"{self._url} cannot be reached ({type(error).__name__})"
        if response.status_code in (401, 403):
            return f"{self._url} refuses the key (status {response.status_code}): see --upstream-api-key-file"
        if response.status_code >= 500:
            return f"{self._url}/v1/models answers {response.status_code}"
        return None

    def _note(self, problem: str | None) -> None:
        state: LoadState = "loaded" if problem is None else "failed"
        if (state, problem) != (self._state, self._error):
            event("upstream", url=self._url, state=state, error=problem or "")
        self._state, self._error = state, problem
        if problem is None:
            self._there.set()
        elif self._tenant is not None:
            self._tenant.note_gone()


def address(settings: Settings) -> str:
    return settings.upstream.rstrip("/").removesuffix("/v1")


def client(settings: Settings) -> httpx2.AsyncClient:
    key = settings.upstream_api_key
    return httpx2.AsyncClient(
        base_url=address(settings),
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(settings.upstream_timeout, connect=CONNECT_TIMEOUT),
        trust_env=False,  # a proxy is for the world, and this is a neighbour
    )


def fields(model: str, options: Options) -> list[tuple[str, str]]:
    """The form that asks an OpenAI-compatible server for everything a transcript has."""
    result = [("model", model), ("response_format", "verbose_json")]
    if options.task == "transcribe":
        result.append(("timestamp_granularities[]", "segment"))
        if options.words:
            result.append(("timestamp_granularities[]", "word"))
        if options.language:
            result.append(("language", options.language))
    if options.prompt:
        result.append(("prompt", options.prompt))
    if options.temperature:
        result.append(("temperature", str(options.temperature)))
    return result


def multipart(
    form: list[tuple[str, str]], descriptor: int, sent: asyncio.Event | None = None
) -> tuple[AsyncIterator[bytes], int, str]:
    """A body that reads the file piece by piece, its length in bytes, its content type.

    `sent` is set when the file is not needed any more.
    """
    boundary = os.urandom(16).hex()
    head = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in form
    )
    head += (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="audio"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    first, last = head.encode(), f"\r\n--{boundary}--\r\n".encode()
    size = os.fstat(descriptor).st_size

    async def body() -> AsyncIterator[bytes]:
        yield first
        offset = 0
        while data := await asyncio.to_thread(os.pread, descriptor, CHUNK, offset):
            offset += len(data)
            yield data
        if sent is not None:
            sent.set()
        yield last

    return body(), len(first) + size + len(last), f"multipart/form-data; boundary={boundary}"


def read_answer(answer: dict[str, Any], options: Options) -> list[Info | Segment]:
    """A verbose_json answer as an engine gives it. ApiError (502) if it is none.

    Servers leave parts out: one without segments gives one that holds everything, and words stand in the
    segments (whisper.cpp) or beside them (OpenAI, Speaches).
    """
    try:
        duration = float(answer.get("duration") or 0.0)
        words = [_word(word) for word in answer.get("words") or []]
        segments = [_segment(item) for item in answer.get("segments") or []]
        text = str(answer["text"]) if not segments else ""
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise errors.engine_answer(f"{type(error).__name__}: {error}") from error
    if not segments and text.strip():
        segments = [Segment(0.0, duration, text)]
    duration = duration or max((segment.end for segment in segments), default=0.0)
    language = languages.code_of(str(answer.get("language") or "")) or options.language
    if options.words:
        segments = give_words(segments, words)
    info = Info(task=options.task, language=language, duration=duration, duration_after_vad=duration)
    return [info, *segments]


def give_words(segments: list[Segment], words: list[Word]) -> list[Segment]:
    """Each word to the segment in which its middle lies, else to the one before it."""
    if not words or any(segment.words for segment in segments):
        return segments
    taken: list[list[Word]] = [[] for _unused in segments]
    index = 0
    for word in words:
        middle = (word.start + word.end) / 2
        while index + 1 < len(segments) and middle >= segments[index + 1].start:
            index += 1
        taken[index].append(word)
    return [
        Segment(**{**vars(segment), "words": tuple(mine)})
        for segment, mine in zip(segments, taken, strict=True)
    ]


def _word(item: dict[str, Any]) -> Word:
    return Word(
        start=float(item["start"]),
        end=float(item["end"]),
        word=str(item["word"]),
        probability=float(item.get("probability") or 0.0),
    )


def _segment(item: dict[str, Any]) -> Segment:
    known = ("seek", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob")
    return Segment(
        start=float(item["start"]),
        end=float(item["end"]),
        text=str(item["text"]),
        tokens=tuple(int(token) for token in item.get("tokens") or ()),
        words=tuple(_word(word) for word in item.get("words") or ()),
        **{name: item[name] for name in known if item.get(name) is not None},
    )


def refused(status: int, body: bytes, model: str, retry_after: str | None) -> ApiError:
    """What an upstream's failure means for whoever asked here."""
    message = message_of(body)
    if "out of memory" in message.casefold():
        return errors.out_of_memory()
    match status:
        case 400 | 413 | 415 | 422:
            return errors.invalid(f"The speech engine refused the request: {message}", code="engine_refused")
        case 401 | 403:
            return errors.unavailable(
                "The speech engine refuses this server's key; its operator must mend that.", "engine_key"
            )
        case 404:
            return errors.unavailable(
                f"The speech engine does not have the model '{model}'. Its operator must add it.",
                "engine_model_missing",
            )
        case 429:
            return ApiError(
                429, "The speech engine has too much to do.", type="rate_limit_error", code="engine_busy",
                headers={"Retry-After": retry_after or "5"},
            )  # fmt: skip
    event("upstream_failed", status=status, message=message)
    return errors.unavailable(f"The speech engine failed with status {status}.", "engine_failed")


def message_of(body: bytes) -> str:
    """The sentence in an error's body, whatever its shape; at most 300 characters."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        value = body.decode("utf-8", "replace")
    for name in ("error", "detail", "message"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split())[:300]
