"""A finished transcript in the forms OpenAI's API gives it. Pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from voicegate import languages, speakers
from voicegate.engine import Info, Segment

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
DIARIZED = "diarized_json"  # of transcriptions, where somebody tells speakers apart


def full_text(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments).strip()


def usage(info: Info) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(info.duration)}


def as_json(segments: Sequence[Segment], info: Info) -> dict[str, Any]:
    return {"text": full_text(segments), "usage": usage(info)}


def as_verbose_json(
    segments: Sequence[Segment], info: Info, *, with_segments: bool = True, with_words: bool = False
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "task": info.task,
        # A translation is in English, whatever was spoken.
        "language": "english" if info.task == "translate" else languages.name_of(info.language),
        "duration": round(info.duration, 3),
        "text": full_text(segments),
    }
    if with_words:
        result["words"] = as_words(segments)
    if with_segments:
        result["segments"] = [
            {
                "id": number,
                "seek": segment.seek,
                "start": round(segment.start, 3),
                "end": round(segment.end, 3),
                "text": segment.text,
                "tokens": list(segment.tokens),
                "temperature": segment.temperature,
                "avg_logprob": segment.avg_logprob,
                "compression_ratio": segment.compression_ratio,
                "no_speech_prob": segment.no_speech_prob,
            }
            for number, segment in enumerate(segments)
        ]
    result["usage"] = usage(info)
    return result


def as_diarized_json(segments: Sequence[Segment], info: Info) -> dict[str, Any]:
    """With the turns that `info` has."""
    return {
        "task": info.task,
        "duration": round(info.duration, 3),
        "text": full_text(segments),
        "segments": [
            {
                "type": "transcript.text.segment",
                "id": f"seg_{number:03d}",
                "start": round(said.start, 3),
                "end": round(said.end, 3),
                "text": said.text,
                "speaker": said.speaker,
            }
            for number, said in enumerate(speakers.merge(segments, info.turns or ()))
        ],
        "usage": usage(info),
    }


def as_words(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    return [
        {"word": word.word.strip(), "start": round(word.start, 3), "end": round(word.end, 3)}
        for segment in segments
        for word in segment.words
    ]


def as_text(segments: Sequence[Segment]) -> str:
    return full_text(segments) + "\n"


def as_srt(segments: Sequence[Segment]) -> str:
    return "".join(
        f"{number}\n{_times(segment, ',')}\n{cue(segment.text)}\n\n"
        for number, segment in enumerate(segments, start=1)
    )


def as_vtt(segments: Sequence[Segment]) -> str:
    return "WEBVTT\n\n" + "".join(
        f"{_times(segment, '.')}\n{vtt_cue(segment.text)}\n\n" for segment in segments
    )


def _times(segment: Segment, mark: str) -> str:
    return f"{timestamp(segment.start, mark)} --> {timestamp(segment.end, mark)}"


def timestamp(seconds: float, mark: str) -> str:
    total = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(total, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def cue(text: str) -> str:
    # A blank line or an arrow would end the cue.
    return " ".join(text.split()).replace("-->", "->")


def vtt_cue(text: str) -> str:
    return cue(text).replace("&", "&amp;").replace("<", "&lt;")


def delta_event(delta: str, timed: Segment | None = None) -> dict[str, Any]:
    """With the times of `timed`, in seconds, where the client asked for those of words: beyond OpenAI's."""
    event: dict[str, Any] = {"type": "transcript.text.delta", "delta": delta}
    if timed is not None:
        event |= {"start": round(timed.start, 3), "end": round(timed.end, 3), "words": as_words([timed])}
    return event


def done_event(text: str, info: Info, segments: Sequence[Segment]) -> dict[str, Any]:
    """OpenAI counts tokens here: of the audio (positions of Whisper's encoder, 50 a second) and the text."""
    audio_tokens = math.ceil(info.duration_after_vad * 50)
    text_tokens = sum(len(segment.tokens) for segment in segments)
    return {
        "type": "transcript.text.done",
        "text": text,
        "usage": {
            "type": "tokens",
            "input_tokens": audio_tokens,
            "input_token_details": {"audio_tokens": audio_tokens, "text_tokens": 0},
            "output_tokens": text_tokens,
            "total_tokens": audio_tokens + text_tokens,
        },
    }


def sse(event: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no raw line break, so one data line is enough."""
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
