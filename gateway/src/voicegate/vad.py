"""Where speech begins and ends in audio that still comes: Silero's probabilities, made into utterances."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voicegate.ears_wire import RATE, Turn

WINDOW = 512  # samples that the model looks at: 32 ms
CONTEXT = 64  # samples before them that it wants to see again
AFTER_CUT = RATE // WINDOW  # windows that should be there after a cut in the middle of speech: a second

Samples = NDArray[np.int16]


class Silero:
    """The model that faster-whisper brings, with its state kept from call to call."""

    def __init__(self) -> None:
        import onnxruntime

        found = importlib.util.find_spec("faster_whisper")
        if found is None or found.origin is None:
            raise ImportError("faster-whisper, which brings the Silero VAD model, is not installed")
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 4
        self._session: Any = onnxruntime.InferenceSession(
            str(Path(found.origin).parent / "assets" / "silero_vad_v6.onnx"),
            providers=["CPUExecutionProvider"],
            sess_options=options,
        )

    def listen(self) -> Listening:
        """A stream of its own; sessions share the model."""
        return Listening(self._session)


class Listening:
    def __init__(self, session: Any) -> None:
        self._session = session
        self._h = np.zeros((1, 1, 128), np.float32)
        self._c = np.zeros((1, 1, 128), np.float32)
        self._context = np.zeros(CONTEXT, np.float32)

    def probabilities(self, samples: Samples) -> list[float]:
        """One for each window; `samples` is whole windows of 16 kHz mono."""
        if not samples.shape[0]:
            return []
        audio = samples.astype(np.float32) / 32768.0
        windows = audio.reshape(-1, WINDOW)
        before = np.concatenate([self._context[None], windows[:-1, -CONTEXT:]])
        self._context = windows[-1, -CONTEXT:]
        found, self._h, self._c = self._session.run(
            None, {"input": np.concatenate([before, windows], 1), "h": self._h, "c": self._c}
        )
        return [float(item) for item in found]


@dataclass(frozen=True)
class Mark:
    """At which window something happens; `end` and `cut` name the first one that is not part any more."""

    kind: Literal["start", "end", "cut"]
    window: int


class Segmenter:
    """Probabilities in, marks out. Pure, so that it can be tested without a model."""

    BEGIN = 3  # windows of speech before a start is told: a click is none

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._silence = max(1, round(turn.silence * RATE / 1000 / WINDOW))
        self._longest = max(self.BEGIN + 1, int(turn.longest * RATE / WINDOW))
        self._window = 0
        self._begin: int | None = None  # first window of what may be, or is, speech
        self._heard = 0  # windows of speech in it
        self._last = 0  # first window after its last speech
        self._since: list[float] = []  # probabilities since `_begin`, while speaking

    @property
    def speaking(self) -> bool:
        return self._heard >= self.BEGIN

    def feed(self, probabilities: list[float]) -> Iterator[Mark]:
        for probability in probabilities:
            yield from self._feed(probability)
            self._window += 1

    def _feed(self, probability: float) -> Iterator[Mark]:
        if self._begin is None:
            if probability < self._turn.threshold:
                return
            self._begin, self._heard, self._since = self._window, 0, []
        self._since.append(probability)
        was_speaking = self.speaking
        # Between the two thresholds speech goes on, and so does silence.
        going_on = was_speaking and self._last == self._window and probability >= self._turn.release
        if probability >= self._turn.threshold or going_on:
            self._heard += 1
            self._last = self._window + 1
        if not was_speaking and self.speaking:
            yield Mark("start", self._begin)
        if self.speaking and self._window + 1 - self._last >= self._silence:
            yield Mark("end", self._last)
            self.reset()
        elif not self.speaking and self._window + 1 - self._last >= self.BEGIN:
            self.reset()
        elif self.speaking and len(self._since) >= self._longest:
            yield self._cut_or_end()

    def _cut_or_end(self) -> Mark:
        """In the quietest place of the last third, so that both parts are of some length."""
        count = len(self._since)
        first, last = count * 2 // 3, count - min(AFTER_CUT, count // 6)
        smooth = np.convolve(self._since, np.ones(3) / 3, mode="same")
        at = first + int(np.argmin(smooth[first:last]))
        begin = self._window + 1 - count + at
        if begin >= self._last:  # a pause that only was not long enough yet
            mark = Mark("end", self._last)
            self.reset()
            return mark
        self._begin = begin
        self._since = self._since[at:]
        return Mark("cut", self._begin)

    def flush(self) -> Mark | None:
        """The end of what is being said, if anything is."""
        mark = Mark("end", self._last) if self.speaking else None
        self.reset()
        return mark

    def reset(self) -> None:
        self._begin, self._heard, self._since = None, 0, []
