"""The Wyoming protocol, by which home automation (Home Assistant, its satellites) asks for speech to text.

A connection sends `transcribe`, `audio-start`, `audio-chunk`s and `audio-stop`; it gets the transcript piece
by piece and whole. The protocol knows no keys: whoever reaches the port is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid

from wyoming import asr, audio, error, event, info, ping

from voicegate import __version__, errors, languages
from voicegate.audio_file import HEADER, wav_header
from voicegate.engine import Engine, Info, Options, Segment
from voicegate.errors import ApiError
from voicegate.logs import event as log
from voicegate.logs import logger, request_id
from voicegate.models import ModelName
from voicegate.settings import Settings
from voicegate.uploads import Upload

CONNECTIONS = 64
IDLE = 60.0  # seconds without an event
LINGER = 2.0  # seconds for a client that was refused to take notice
EVENT_LIMIT = 1024 * 1024  # bytes of an event's data or audio; satellites send a few KiB


class BoundedReader(asyncio.StreamReader):
    """Does not take what an event only claims to need."""

    async def readexactly(self, n: int) -> bytes:
        if not 0 <= n <= EVENT_LIMIT:
            raise errors.invalid(f"An event of {n} bytes is more than this server takes ({EVENT_LIMIT}).")
        return await super().readexactly(n)


class Wyoming:
    """The server; `port` is the real one once it was started."""

    def __init__(self, settings: Settings, model: ModelName, engine: Engine) -> None:
        self._settings = settings
        self._model = model
        self._engine = engine
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """OSError if the port is taken."""
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(BoundedReader(loop=loop), self._accept, loop=loop)

        self._server = await loop.create_server(protocol, self._settings.host, self._settings.wyoming_port)
        log("listening_wyoming", host=self._settings.host, port=self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = Conversation(self._settings, self._model, self._engine, writer)
        token = request_id.set(f"wyoming_{uuid.uuid4().hex}")
        try:
            if len(self._connections) > CONNECTIONS:
                raise errors.queue_full(CONNECTIONS, 5)
            while True:
                async with asyncio.timeout(IDLE):
                    received = await event.async_read_event(reader)
                if received is None:
                    return
                await talk.take(received)
        except ApiError as failure:
            log("wyoming_refused", code=failure.code, status=failure.status)
            await refuse(talk, reader, error.Error(failure.message, failure.code))
        except (TimeoutError, OSError, EOFError):
            return  # it went away, or stopped talking
        except (AttributeError, KeyError, TypeError, ValueError) as failure:  # no event of the protocol
            log("wyoming_refused", code="bad_event", error=type(failure).__name__)
            await refuse(talk, reader, error.Error("That is no event of the Wyoming protocol.", "bad_event"))
        except Exception:
            logger.exception("wyoming_failed")
        finally:
            talk.close()
            writer.close()
            request_id.reset(token)


class Conversation:
    """What one connection said so far."""

    def __init__(
        self, settings: Settings, model: ModelName, engine: Engine, writer: asyncio.StreamWriter
    ) -> None:
        self._settings = settings
        self._model = model
        self._engine = engine
        self._writer = writer
        self._peer = str((writer.get_extra_info("peername") or ("",))[0])
        self._asked = asr.Transcribe()
        self._format: audio.AudioStart | None = None
        self._upload: Upload | None = None

    async def take(self, received: event.Event) -> None:
        """Answer one event. What is not known is left alone, as the protocol wants."""
        if info.Describe.is_type(received.type):
            await self.send(self._describe())
        elif ping.Ping.is_type(received.type):
            await self.send(ping.Pong(ping.Ping.from_event(received).text))
        elif asr.Transcribe.is_type(received.type):
            self._asked = asr.Transcribe.from_event(received)
        elif audio.AudioStart.is_type(received.type):
            self._begin(audio.AudioStart.from_event(received))
        elif audio.AudioChunk.is_type(received.type):
            await self._listen(audio.AudioChunk.from_event(received))
        elif audio.AudioStop.is_type(received.type):
            await self._answer()

    async def send(self, answer: event.Eventable) -> None:
        await event.async_write_event(answer.event(), self._writer)

    def hang_up(self) -> None:
        """Nothing more will be said."""
        self._writer.write_eof()

    def close(self) -> None:
        if self._upload is not None:
            self._upload.close()
            self._upload = None

    def _begin(self, started: audio.AudioStart) -> None:
        numbers = (started.rate, started.width, started.channels)
        if not all(isinstance(number, int) for number in numbers) or not (
            8000 <= started.rate <= 192_000 and started.width in (1, 2, 3, 4) and 1 <= started.channels <= 8
        ):
            raise errors.bad_audio(f"rate, width and channels are {numbers}")
        self.close()
        self._engine.check_room()
        self._format = started
        self._upload = Upload(self._settings.max_upload_mib, self._settings.upload_dir)
        self._upload.feed(bytes(HEADER.size))  # written when the length is known

    async def _listen(self, chunk: audio.AudioChunk) -> None:
        if self._upload is None:
            self._begin(audio.AudioStart(chunk.rate, chunk.width, chunk.channels))
        if self._upload is not None:
            self._upload.feed(chunk.audio)
            await self._upload.flush()

    async def _answer(self) -> None:
        if self._upload is None or self._format is None or self._upload.size == HEADER.size:
            raise errors.bad_audio("it is empty")
        if self._asked.name and not self._model.matches(self._asked.name):
            raise errors.unknown_model(self._asked.name, [self._model.id])
        options = Options(language=self._language(), prompt=self._prompt())
        form, size = self._format, self._upload.size - HEADER.size
        os.pwrite(self._upload.descriptor(), wav_header(form.rate, form.width, form.channels, size), 0)
        started = time.perf_counter()
        segments: list[Segment] = []
        found: Info | None = None
        async with contextlib.aclosing(
            self._engine.transcribe(self._upload, options, client=self._peer)
        ) as items:
            async for item in items:
                if isinstance(item, Info):
                    found = item
                    await self.send(asr.TranscriptStart(language=item.language))
                    continue
                await self.send(asr.TranscriptChunk(item.text if segments else item.text.lstrip()))
                segments.append(item)
        text = "".join(segment.text for segment in segments).strip()
        await self.send(asr.Transcript(text, language=found.language if found else None))
        await self.send(asr.TranscriptStop())
        log(
            "wyoming", level=logging.INFO, language=found.language if found else None,
            audio_seconds=found.duration if found else 0.0, seconds=time.perf_counter() - started,
        )  # fmt: skip
        self.close()
        self._asked = asr.Transcribe()

    def _language(self) -> str | None:
        given = self._asked.language
        if not given:
            return self._settings.language or None
        code = languages.code_of(given)
        if code is None:
            raise errors.invalid(f"Language '{given}' is not supported.", "language", "unsupported_language")
        return code

    def _prompt(self) -> str | None:
        """Names and terms, as Whisper takes them: text that seems to have been said before."""
        terms = [*(self._asked.transcript_names or []), *(self._asked.transcript_terms or [])]
        return ", ".join(terms) or None

    def _describe(self) -> info.Info:
        ours = info.Attribution("The sottovoce.stack contributors", "")
        able = self._engine.capabilities()
        model = info.AsrModel(
            name=self._model.id,
            attribution=ours,
            installed=True,
            description=self._model.configured,
            version=None,
            languages=sorted(able.languages if able else languages.NAMES),
        )
        program = info.AsrProgram(
            name="voicegate",
            attribution=ours,
            installed=True,
            description="Speech to text",
            version=__version__,
            models=[model],
            supports_transcript_streaming=True,
        )
        return info.Info(asr=[program])


async def refuse(talk: Conversation, reader: asyncio.StreamReader, answer: error.Error) -> None:
    """Say it, and hear out what is under way: hanging up on it would take the answer from the client."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER):
            await talk.send(answer)
            talk.hang_up()
            while await reader.read(65536):
                pass
