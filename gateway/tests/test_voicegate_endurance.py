"""Memory stays flat. The long version, 10,000 requests and a file of hours: `gateway/bench/endurance.py`."""

from __future__ import annotations

import io
import os
import wave
from collections.abc import Callable

import endurance
from endurance import Request
from voicegate_support import CLIPS, Server

CLIP = CLIPS / "D009.wav"
Serve = Callable[..., Server]


def silence(seconds: int) -> bytes:
    """Costs the model nothing; whatever is forgotten of it is a megabyte for every half minute."""
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(32000 * seconds))
    return target.getvalue()


def files(server: int) -> dict[str, int]:
    return {
        role: sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
        for role, pids in endurance.family(server).items()
    }


def test_memory_is_flat_over_many_requests(serve: Serve) -> None:
    quiet = silence(30)
    round_ = [
        Request("silence", quiet, {}, text='"text":""'),
        Request("clip", CLIP.read_bytes(), {"language": "en"}, text="Turn up the volume.", fresh=True),
        Request("garbage", quiet[44:], {}, status=400, code="invalid_audio"),
        Request("unknown model", quiet, {"model": "no-such"}, status=404, code="model_not_found"),
        Request("leaves before the answer", quiet, {}, leave="sent"),
        Request("leaves in the upload", quiet, {}, leave="sending"),
        Request("silence, stream", quiet, {"stream": "true"}, text="transcript.text.done", fresh=True),
        Request("half a file", quiet[: len(quiet) // 2], {"response_format": "srt"}),
    ]
    # One arena of malloc: others come with threads at the same time, and look like growth.
    server = serve("--beam-size", "1", env={"MALLOC_ARENA_MAX": "1"})
    pid = server.process.pid
    endurance.many(pid, server.port, 40, round_)  # what is kept from the first ones on
    before = files(pid)
    assert set(before) == {"server", "engine", "decoder"}
    found = endurance.many(pid, server.port, 160, round_, every=8)["readings"]
    for role in before:
        # What is forgotten of one kind of request of the eight is 19 MiB.
        assert found[-1][role] - found[0][role] < 12, [item[role] for item in found]
    after = files(pid)
    assert all(after[role] <= before[role] + 3 for role in before), (before, after)
    assert "Traceback" not in server.log


def test_judged_finds_the_slope() -> None:
    readings = [{"requests": 100.0 * n, "engine": 200 + 0.5 * n} for n in range(1, 101)]
    found = endurance.judged(readings)["engine"]
    assert found == {"growth": 5.0, "first_quarter": 210.8, "last_quarter": 244.8}
