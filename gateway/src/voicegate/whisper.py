"""faster-whisper: what the engine `builtin` computes, in a process of its own (see `process`)."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ctranslate2
import faster_whisper
import numpy as np
from faster_whisper.audio import pad_or_trim
from faster_whisper.transcribe import restore_speech_timestamps

from voicegate import audio, errors, speech
from voicegate.decoder import Decoder
from voicegate.engine import Info, Options, Segment, Word
from voicegate.errors import ModelUnavailable
from voicegate.logs import event
from voicegate.settings import Settings

# In order of preference, what replaces a compute type that a device cannot do.
_CPU_FALLBACK = ("int8", "int8_float32", "float32")
_GPU_FALLBACK: dict[str, tuple[str, ...]] = {
    "bfloat16": ("float16", "float32"),
    "float16": ("int8_float32", "int8", "float32"),
    "int8_bfloat16": ("int8_float16", "int8_float32", "int8", "float32"),
    "int8_float16": ("int8_float32", "int8", "float32"),
    "int16": ("int8", "float16", "float32"),
}


def effective_compute_type(requested: str, device: str, supported: Iterable[str]) -> str:
    """What runs where `requested` is asked for on a device that can do `supported`."""
    able = set(supported)
    if requested == "auto":
        order: tuple[str, ...] = _CPU_FALLBACK if device == "cpu" else ("float16", "int8", "float32")
    elif device == "cpu":
        order = (requested, *_CPU_FALLBACK)
    else:
        order = (requested, *_GPU_FALLBACK.get(requested, ("int8", "float32")))
    return next((item for item in order if item in able), "float32")


def default_threads() -> int:
    """Cores this process may use; beyond 8 a single transcription gains nothing."""
    return min(8, len(os.sched_getaffinity(0)))


class OneEncoding(faster_whisper.WhisperModel):  # type: ignore[misc]  # the package has no types
    """Detects the language from the same encoding that is then transcribed.

    faster-whisper runs the encoder twice on the first 30 seconds when no language is given. For a
    short utterance the encoder is most of the work, so that nearly doubles the time.

    Several transcriptions may be open: each finds its own encoding by the window that it belongs to. What
    is not fetched (cancelled in between) is pushed out by later ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.feature_extractor = speech.Spectrum(**self.feat_kwargs)
        self._encoded: collections.deque[tuple[np.ndarray[Any, Any], Any]] = collections.deque(maxlen=4)
        self._lock = threading.Lock()

    def detect_language(
        self, audio: Any = None, features: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[str, float, list[tuple[str, float]]]:
        if features is None:
            result: tuple[str, float, list[tuple[str, float]]] = super().detect_language(
                audio, *args, **kwargs
            )
            return result
        # The window exactly as generate_segments cuts it.
        frames = min(self.feature_extractor.nb_max_frames, features.shape[-1] - 1)
        window = pad_or_trim(features[..., :frames])
        encoding = super().encode(window)
        with self._lock:
            self._encoded.append((window, encoding))
        found = [(token[2:-2], float(p)) for token, p in self.model.detect_language(encoding)[0]]
        return found[0][0], found[0][1], found

    def encode(self, features: Any) -> Any:
        with self._lock:
            for index, (window, encoding) in enumerate(self._encoded):
                if np.array_equal(window, features):
                    del self._encoded[index]
                    return encoding
        return super().encode(features)


class Whisper:
    """The model and what it does. Lives in the engine's process."""

    def __init__(self, settings: Settings, folder: Path, decoder: Decoder) -> None:
        self.device = settings.device
        self.compute_type = settings.compute_type
        self._settings = settings
        self._folder = folder
        self._threads = settings.cpu_threads or default_threads()
        self._decoder = decoder
        self._model = self._load()

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._model.supported_languages)

    def _load(self) -> OneEncoding:
        started = time.monotonic()
        try:
            model = self._load_on_best_device()
        except ModelUnavailable:
            raise
        except Exception as error:
            raise ModelUnavailable(f"cannot load {self._folder}: {error}") from error
        event(
            "model_loaded", seconds=time.monotonic() - started, model=self._settings.model,
            device=self.device, compute_type=self.compute_type,
        )  # fmt: skip
        return model

    def _load_on_best_device(self) -> OneEncoding:
        wanted = self._settings.device
        if wanted != "cpu":
            count = ctranslate2.get_cuda_device_count()
            if count > self._settings.device_index:
                _preload_cuda_libraries()
                try:
                    return self._load_on("cuda")
                except Exception as error:
                    if wanted == "cuda":
                        raise
                    event("gpu_unusable", level=logging.WARNING, error=str(error), instead="cpu")
            elif wanted == "cuda":
                raise ModelUnavailable(
                    f"device cuda: CTranslate2 sees {count} GPUs,"
                    f" number {self._settings.device_index} is wanted;"
                    " check the driver in this machine or container, or set device to cpu"
                )
        return self._load_on("cpu")

    def _load_on(self, device: str) -> OneEncoding:
        requested = self._settings.compute_type
        index = self._settings.device_index if device == "cuda" else 0
        compute_type = effective_compute_type(
            requested, device, ctranslate2.get_supported_compute_types(device, index)
        )
        if requested not in ("auto", compute_type):
            event(
                "compute_type_replaced", level=logging.WARNING, device=device, requested=requested,
                effective=compute_type,
            )  # fmt: skip
        model = OneEncoding(
            str(self._folder),
            device=device,
            device_index=index,
            compute_type=compute_type,
            cpu_threads=self._threads,
            local_files_only=True,
        )
        language = self._settings.language
        if language and language not in model.supported_languages:
            raise ModelUnavailable(
                f"the model {self._settings.model} knows only English; --language is {language}"
            )
        # A missing CUDA library shows up at the first use only, and first uses are slow: do them now.
        speech.find(np.zeros(audio.RATE, np.int16))
        noise = np.random.default_rng(0).normal(0, 0.05, audio.RATE).astype(np.float32)
        for _ in model.transcribe(noise, max_new_tokens=8, temperature=0.0)[0]:
            pass
        self.device = device
        self.compute_type = compute_type
        return model

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """What goes wrong, as ApiError for the client."""
        try:
            yield
        # CTranslate2 reports what goes wrong on the device as RuntimeError.
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                event("out_of_memory", level=logging.ERROR, device=self.device, error=str(error))
                raise errors.out_of_memory() from error
            event("transcription_failed", level=logging.ERROR, error=str(error))
            raise errors.internal() from error

    def open(
        self, source: BinaryIO, options: Options, cancelled: Callable[[], bool]
    ) -> tuple[Info, Iterator[Segment]] | None:
        """Everything before the first segment; None once `cancelled`. May run beside other calls.

        Each of the iterator's steps computes at most one window with speech in it. All state is the
        iterator's own, so that others may take steps in between. ApiError for the client.
        """
        with self._failures():
            return self._open(source, options, cancelled)

    def _open(
        self, source: BinaryIO, options: Options, cancelled: Callable[[], bool]
    ) -> tuple[Info, Iterator[Segment]] | None:
        decoded = self._decoder.decode(source, cancelled)
        if decoded is None:
            return None
        language = options.language
        if language is not None and language not in self._model.supported_languages:
            raise errors.only_english(self._settings.model)
        samples = np.frombuffer(decoded, np.int16)
        duration = samples.shape[0] / audio.RATE
        spans: list[dict[str, int]] = []
        if self._settings.vad and not options.draft:  # of a draft it is known to be speech
            spans = speech.find(samples, cancelled)
            if not spans:
                return Info(options.task, language, duration, 0.0), iter(())
            samples = speech.collect(samples, spans)
        del decoded  # with what was not said
        if cancelled():
            return None
        segments, found = self._model.transcribe(
            samples,
            language=language,
            task=options.task,
            **self._search(options),
            initial_prompt=options.prompt or None,
            hotwords=options.hotwords,
            word_timestamps=options.words,
        )
        if spans:
            segments = restore_speech_timestamps(segments, spans, audio.RATE)
        info = Info(options.task, found.language, duration, found.duration)
        return info, self._segments(segments)

    def _search(self, options: Options) -> dict[str, Any]:
        if options.draft:
            return {"beam_size": 1, "temperature": 0.0}
        # 0 lets faster-whisper climb through higher ones where the text looks wrong.
        warmth = {"temperature": options.temperature} if options.temperature else {}
        return {"beam_size": self._settings.beam_size, **warmth}

    def _segments(self, segments: Iterable[Any]) -> Iterator[Segment]:
        with self._failures():
            for segment in segments:
                yield _segment(segment)


def _segment(found: Any) -> Segment:
    return Segment(
        start=float(found.start),
        end=float(found.end),
        text=found.text,
        seek=int(found.seek),
        tokens=tuple(found.tokens),
        temperature=float(found.temperature or 0.0),
        avg_logprob=float(found.avg_logprob),
        compression_ratio=float(found.compression_ratio),
        no_speech_prob=float(found.no_speech_prob),
        words=tuple(
            Word(float(word.start), float(word.end), word.word, float(word.probability))
            for word in found.words or ()
        ),
    )


def _preload_cuda_libraries() -> None:
    """Load cuBLAS and cuDNN from the Python environment: CTranslate2 opens them by name later."""
    for package, pattern in (("cublas", "libcublas*.so.*"), ("cudnn", "libcudnn*.so.*")):
        try:
            spec = importlib.util.find_spec(f"nvidia.{package}")
        except ModuleNotFoundError:
            return
        if spec is None:
            continue
        for root in spec.submodule_search_locations or ():
            # cublasLt before cublas, which needs it.
            libraries = sorted(
                (Path(root) / "lib").glob(pattern), key=lambda path: (-len(path.name), path.name)
            )
            for library in libraries:
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
