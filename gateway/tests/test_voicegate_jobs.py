"""Jobs against live servers with the demo model, killed ones among them."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from voicegate_support import CLIPS, MODEL, Clip, Receiver, Server, clips, environment, long_audio

CLIP = CLIPS / "D009.wav"
TEXT = "Turn up the volume."

Serve = Callable[..., Server]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server("--model", str(MODEL), "--data-dir", str(tmp_path_factory.mktemp("jobs") / "data"))
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def post(
    server: Server, audio: bytes | Path = CLIP, headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, dict[str, str], Any]:
    content = audio.read_bytes() if isinstance(audio, Path) else audio
    parts = [('name="audio"; filename="a.wav"', content)]
    parts += [(f'name="{name}"', value.encode()) for name, value in ({"language": "en"} | fields).items()]
    status, answered, body = server.post("/jobs", parts, headers)
    return status, answered, json.loads(body)


def accepted(server: Server, audio: bytes | Path = CLIP, **fields: Any) -> str:
    status, headers, body = post(server, audio, **fields)
    assert status == 202, body
    assert headers["location"] == f"/jobs/{body['id']}"
    return str(body["id"])


def get(server: Server, path: str) -> Any:
    status, _headers, body = server.request("GET", path)
    assert status == 200, body
    return json.loads(body)


def error(answer: tuple[int, dict[str, str], Any]) -> tuple[int, str, str]:
    status, _headers, body = answer
    body = body if isinstance(body, dict) else json.loads(body)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return status, body["error"]["code"], body["error"]["param"]


def wait(server: Server, id: str, *statuses: str, seconds: float = 30) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while (job := get(server, f"/jobs/{id}"))["status"] not in (statuses or ("done", "failed", "cancelled")):
        assert time.monotonic() < deadline, (job["status"], server.log)
        time.sleep(0.03)
    return dict(job)


def result(server: Server, id: str, query: str = "format=txt") -> str:
    status, _headers, body = server.request("GET", f"/jobs/{id}/result?{query}")
    assert status == 200, body
    return body.decode()


class Events:
    """A stream of events as it arrives."""

    def __init__(self, server: Server, id: str, seen: str = "") -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        self._connection.request("GET", f"/jobs/{id}/stream", headers={"Last-Event-ID": seen} if seen else {})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        assert self._answer.headers["content-type"].startswith("text/event-stream")

    def __iter__(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        fields: dict[str, str] = {}
        for line in self._answer:
            text = line.decode().rstrip("\n")
            if text == "" and fields:
                yield fields["event"], fields["id"], json.loads(fields["data"])
                fields = {}
            elif text and not text.startswith(":"):
                name, _colon, value = text.partition(": ")
                fields[name] = value

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


# -- one job


@pytest.mark.parametrize("clip", clips("DF")[::2], ids=lambda clip: clip.file)
def test_exact_text(jobs: Server, clip: Clip) -> None:
    id = accepted(jobs, clip.path, language=clip.language)
    job = wait(jobs, id)
    assert (job["status"], job["progress"], job["error"], job["language"]) == (
        "done",
        100,
        None,
        clip.language,
    )
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] <= time.time()
    assert "".join(segment["text"] for segment in job["segments"]).strip() == clip.text
    assert result(jobs, id) == clip.text + "\n"


def test_language_is_detected(jobs: Server) -> None:
    german = clips("F")[0]
    job = wait(jobs, accepted(jobs, german.path, language="auto"))
    assert (job["language"], job["segments"][0]["text"].strip()) == ("de", german.text)


def test_result_in_every_format(jobs: Server) -> None:
    id = accepted(jobs, response_format="srt")
    wait(jobs, id)
    for query, kind in (("", "application/x-subrip"), ("format=srt", "application/x-subrip")):
        status, headers, body = jobs.request("GET", f"/jobs/{id}/result?{query}")
        assert (status, headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert re.fullmatch(rf"1\n00:00:00,000 --> 00:00:01,\d\d\d\n{TEXT}\n\n", body.decode())
    assert result(jobs, id, "format=vtt").startswith("WEBVTT\n\n00:00:00.000 --> ")
    assert result(jobs, id, "format=text") == TEXT + "\n"
    assert json.loads(result(jobs, id, "format=json")) == {
        "text": TEXT, "usage": {"type": "duration", "seconds": 2},
    }  # fmt: skip
    verbose = json.loads(result(jobs, id, "format=verbose_json"))
    assert [word["word"] for word in verbose["words"]] == TEXT.split()
    assert (verbose["segments"][0]["text"], verbose["task"]) == (f" {TEXT}", "transcribe")
    only = json.loads(result(jobs, id, "format=verbose_json&timestamp_granularities[]=segment"))
    assert "words" not in only
    narrow = result(jobs, id, "format=vtt&max_line_chars=12&max_lines=1").split("\n\n")[1:-1]
    assert [cue.split("\n")[1] for cue in narrow] == ["Turn up the", "volume."]
    for query, param in (("format=docx", "format"), ("max_lines=9", "max_lines")):
        assert error(jobs.request("GET", f"/jobs/{id}/result?{query}")) == (400, "invalid_value", param)


def test_layout_of_the_request_holds_for_the_result(jobs: Server) -> None:
    id = accepted(jobs, response_format="vtt", max_line_chars="12")
    wait(jobs, id)
    assert "Turn up the\nvolume." in result(jobs, id, "")


def test_words_can_be_left_out(jobs: Server) -> None:
    job = wait(jobs, accepted(jobs, timestamp_granularities="segment"))
    assert set(job["segments"][0]) == {"id", "start", "end", "text"}


def test_file_is_taken_for_audio(jobs: Server) -> None:
    parts = [('name="file"', CLIP.read_bytes()), ('name="language"', b"en")]
    status, _headers, body = jobs.post("/jobs", parts)
    assert status == 202
    assert wait(jobs, json.loads(body)["id"])["status"] == "done"


def test_bad_audio_fails_with_its_error(jobs: Server) -> None:
    id = accepted(jobs, b"no sound at all" * 100)
    job = wait(jobs, id)
    assert job["status"] == "failed"
    assert (job["error"]["code"], job["error"]["param"]) == ("invalid_audio", "file")
    assert error(jobs.request("GET", f"/jobs/{id}/result"))[:2] == (409, "job_failed")
    [(name, _number, data)] = list(Events(jobs, id))
    assert (name, data["error"]["code"]) == ("failed", "invalid_audio")


# -- refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"priority": "urgent"}, "priority"),
        ({"language": "klingon"}, "language"),
        ({"task": "sing"}, "task"),
        ({"response_format": "docx"}, "response_format"),
        ({"max_line_chars": "x"}, "max_line_chars"),
        ({"temperature": "9"}, "temperature"),
        ({"webhook_url": "http://192.168.0.9/"}, "webhook_url"),  # no secret is set here
    ],
)
def test_the_route_names_what_is_wrong(jobs: Server, fields: dict[str, Any], param: str) -> None:
    status, _code, named = error(post(jobs, **fields))
    assert (status, named) == (400, param)


def test_other_refusals(jobs: Server) -> None:
    assert error(jobs.post("/jobs", [('name="language"', b"en")])) == (
        400,
        "missing_required_parameter",
        "audio",
    )
    assert error(post(jobs, b"")) == (400, "invalid_audio", "file")
    assert error(post(jobs, model="gpt-9")) == (404, "model_not_found", "model")
    assert error(post(jobs, headers={"Idempotency-Key": "x" * 256}))[0] == 400
    missing = "job_" + "0" * 32
    for method, path in (("GET", ""), ("GET", "/stream"), ("GET", "/result"), ("GET", "/deliveries"),
                         ("DELETE", "")):  # fmt: skip
        assert error(jobs.request(method, f"/jobs/{missing}{path}")) == (404, "job_not_found", "id")
    for query in ("status=lost", "limit=0", "limit=1000", "after=x", "order=up", "created_after=nan"):
        assert error(jobs.request("GET", f"/jobs?{query}"))[2] == query.partition("=")[0]


def test_off_without_a_folder(server: Server) -> None:
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/x"), ("DELETE", "/x"), ("GET", "/x/stream")):
        status, _headers, body = server.request(method, f"/jobs{path}")
        assert (status, json.loads(body)["error"]["code"]) == (501, "jobs_off")
        assert "VOICEGATE_DATA_DIR" in json.loads(body)["error"]["message"]


def test_idempotency_key(jobs: Server) -> None:
    headers = {"Idempotency-Key": "one and the same"}
    first = post(jobs, headers=headers)
    assert "idempotent-replayed" not in first[1]
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(post(jobs, headers=headers))) for _number in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [(status, body) for status, _headers, body in found] == [(202, first[2])] * 5
    assert {answered["idempotent-replayed"] for _status, answered, _body in found} == {"true"}
    assert error(post(jobs, headers=headers, priority="low"))[:2] == (422, "idempotency_key_reused")
    other = clips("D")[0].path
    assert error(post(jobs, other, headers=headers))[:2] == (422, "idempotency_key_reused")


# -- several


def test_pages(serve: Serve, tmp_path: Path) -> None:
    server = serve("--data-dir", str(tmp_path), "--queue-limit", "1")  # which is not for jobs
    blocker = accepted(server, long_audio(60, 0.6))  # so that the rest stays queued
    wait(server, blocker, "running")
    before = time.time()
    ids = [accepted(server, priority=priority) for priority in ("normal", "low", "high", "normal", "normal")]

    def listed(query: str) -> tuple[list[str], bool]:
        page = get(server, f"/jobs?{query}")
        found = [job["id"] for job in page["data"]]
        assert (page["first_id"], page["last_id"]) == ((found[0], found[-1]) if found else (None, None))
        return found, page["has_more"]

    assert listed("") == ([*reversed(ids), blocker], False)
    assert listed("limit=2") == ([ids[4], ids[3]], True)
    assert listed(f"limit=2&after={ids[3]}") == ([ids[2], ids[1]], True)
    assert listed(f"limit=2&after={ids[1]}") == ([ids[0], blocker], False)
    assert listed(f"order=asc&after={ids[3]}") == ([ids[4]], False)
    assert listed("status=running") == ([blocker], False)
    assert listed(f"status=queued,running&created_after={before}") == ([*reversed(ids)], False)
    assert listed(f"created_before={before}") == ([blocker], False)
    assert listed("status=failed") == ([], False)
    assert "segments" not in get(server, "/jobs?limit=1")["data"][0]

    # A queued one is cancelled at once; the others are done by priority.
    status, _headers, body = server.request("DELETE", f"/jobs/{ids[3]}")
    assert (status, json.loads(body)["status"]) == (200, "cancelled")
    server.request("DELETE", f"/jobs/{blocker}")
    # Whoever waits for an answer goes first, and finds the queue of such requests empty.
    status, _headers, body = server.post("/v1/audio/transcriptions", [('name="file"', CLIP.read_bytes())])
    assert (status, json.loads(body)["text"]) == (200, TEXT)
    for id in (ids[0], ids[1], ids[2], ids[4]):
        wait(server, id, "done")
    started = {id: get(server, f"/jobs/{id}")["started_at"] for id in ids}
    assert started[ids[3]] is None
    assert sorted((ids[0], ids[1], ids[2], ids[4]), key=lambda id: started[id]) == [
        ids[2],
        ids[0],
        ids[4],
        ids[1],
    ]
    assert listed("status=cancelled")[0] == [ids[3], blocker]
    assert not list((tmp_path / "audio").iterdir())


def test_stream_and_resume(jobs: Server) -> None:
    id = accepted(jobs, long_audio(24, 0.6))  # more than one window of the model
    first = Events(jobs, id)
    seen: list[tuple[str, str, dict[str, Any]]] = []
    for item in first:
        seen.append(item)
        if sum(name == "segment" for name, _number, _data in seen) == 2:
            break
    first.close()
    rest = list(Events(jobs, id, seen[-1][1]))
    segments = [data for name, _number, data in [*seen, *rest] if name == "segment"]
    assert [segment["id"] for segment in segments] == list(range(len(segments)))
    job = get(jobs, f"/jobs/{id}")
    assert segments == job["segments"]
    assert result(jobs, id) == "".join(segment["text"] for segment in segments).strip() + "\n"
    progress = [data["progress"] for name, _number, data in [*seen, *rest] if name == "progress"]
    assert progress == sorted(progress)
    assert max(progress) > 50
    name, number, data = rest[-1]
    assert (name, number, data["status"], data["progress"]) == ("done", "1.end", "done", 100)
    assert "restarted" not in [name for name, _number, _data in rest]
    # The whole of it again for who knows nothing; no more for who has seen the end.
    assert [name for name, _number, _data in Events(jobs, id)] == ["segment"] * len(segments) + ["done"]
    assert jobs.request("GET", f"/jobs/{id}/stream", headers={"Last-Event-ID": number})[0] == 204


def test_cancel_stops_the_engine_within_a_segment(jobs: Server) -> None:
    id = accepted(jobs, long_audio(120, 0.6))  # 8 windows of the model
    started = time.monotonic()
    events = iter(Events(jobs, id))
    assert "segment" in (name for name, _number, _data in events)
    window = time.monotonic() - started
    assert jobs.health()[1]["queue"]["running"] == 1
    cancelled = time.monotonic()
    status, _headers, body = jobs.request("DELETE", f"/jobs/{id}")
    assert (status, json.loads(body)["status"]) == (200, "cancelled")
    assert [name for name, _number, _data in events][-1] == "cancelled"
    next_one = accepted(jobs)
    assert wait(jobs, next_one)["status"] == "done"
    # At most the window that is being decoded, and the next job: not the other seven.
    assert time.monotonic() - cancelled < 3 * window
    assert jobs.health()[1]["queue"]["running"] == 0
    assert len(re.findall(" engine_started ", jobs.log)) == 1
    assert error(jobs.request("GET", f"/jobs/{id}/result"))[:2] == (409, "job_cancelled")
    assert jobs.request("DELETE", f"/jobs/{id}")[0] == 200  # once more is no error
    assert error(jobs.request("DELETE", f"/jobs/{next_one}"))[:2] == (409, "job_finished")


def test_limit_quota_and_retention(serve: Serve, tmp_path: Path) -> None:
    data = tmp_path / "data"
    server = serve("--data-dir", str(data), "--job-limit", "2", "--job-quota-mib", "3",
                   "--job-retention-hours", "1")  # fmt: skip
    long = long_audio(16)
    assert 1.5 * 2**20 < len(long) < 3 * 2**20
    first = accepted(server, long)
    answer = post(server, long)
    assert error(answer)[:2] == (507, "job_quota_exceeded")
    assert "VOICEGATE_JOB_QUOTA_MIB" in answer[2]["error"]["message"]
    second = accepted(server)
    refused = post(server)
    assert error(refused)[:2] == (429, "too_many_jobs")
    assert 1 <= int(refused[1]["retry-after"]) <= 600
    assert sorted(path.name for path in (data / "audio").iterdir()) == sorted((first, second))
    assert wait(server, first)["status"] == "done"
    assert wait(server, second)["status"] == "done"
    third = accepted(server, long)  # its quota is free again
    assert wait(server, third)["status"] == "done"
    assert server.stop() == 0
    with sqlite3.connect(data / "jobs.sqlite3") as database:
        database.execute("UPDATE jobs SET finished = finished - 3601 WHERE id IN (?, ?)", (first, second))
    database.close()
    server = serve("--data-dir", str(data), "--job-retention-hours", "1", ready=False)
    server.wait_listening()
    deadline = time.monotonic() + 10
    while [job["id"] for job in get(server, "/jobs")["data"]] != [third]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert error(server.request("GET", f"/jobs/{first}/result"))[:2] == (404, "job_not_found")


def test_a_full_disk_loses_nothing(jobs: Server) -> None:
    """The kernel lets the server write no file: requests are refused, a result waits to be stored."""

    def limit(size: int) -> None:
        _soft, hard = resource.prlimit(jobs.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(jobs.process.pid, resource.RLIMIT_FSIZE, (size, hard))

    id = accepted(jobs, long_audio(12, 0.6))
    wait(jobs, id, "running")
    limit(0)
    try:
        assert error(post(jobs))[:2] == (507, "no_space")
        deadline = time.monotonic() + 20
        while " again_in_seconds=" not in jobs.log:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert get(jobs, f"/jobs/{id}")["status"] == "running"
    finally:
        limit(resource.RLIM_INFINITY)
    job = wait(jobs, id)
    assert (job["status"], len(job["segments"]) > 0) == ("done", True)
    assert re.search(r" store_failed .* again_in_seconds=1.000 request_id=job_", jobs.log)
    assert wait(jobs, accepted(jobs))["status"] == "done"


def test_folders_that_cannot_be_used(jobs: Server, tmp_path: Path) -> None:
    def refusal(folder: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "voicegate", "serve", "--model", str(MODEL), "--port", "0",
             "--data-dir", str(folder)],
            env=environment(), capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    [opened] = re.findall(r" jobs_opened folder=(\S+)", jobs.log)
    assert f"voicegate: --data-dir: {opened} is in use by another voicegate" in refusal(opened)
    (tmp_path / "jobs.sqlite3").write_bytes(b"damaged" * 1000)
    assert "jobs.sqlite3 cannot be read (file is not a database); put a copy back" in refusal(tmp_path)


def test_a_job_outlives_its_engine_and_its_server(serve: Serve, tmp_path: Path) -> None:
    server = serve("--data-dir", str(tmp_path))
    id = accepted(server, long_audio(60, 0.6))
    events = iter(Events(server, id))
    assert "segment" in (name for name, _number, _data in events)
    [engine] = re.findall(r" engine_started pid=(\d+)", server.log)
    os.kill(int(engine), signal.SIGKILL)
    found = list(itertools.takewhile(lambda item: item[:2] != ("segment", "2.2"), events))
    assert ("restarted", "2.0", {"id": id}) in found
    assert re.search(r" job_failed error=engine_down decision=again request_id=job_", server.log)
    # A server that is asked to end does not wait for those who wait for the job.
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 5
    assert "done" not in [name for name, _number, _data in events]
    assert "Traceback" not in server.log
    server = serve("--data-dir", str(tmp_path), ready=False)
    server.wait_listening()
    again = list(itertools.takewhile(lambda item: item[0] != "segment", Events(server, id, "2.2")))
    assert ("restarted", "3.0", {"id": id}) in again
    assert server.request("DELETE", f"/jobs/{id}")[0] == 200


# -- kill -9


def test_kill_9_at_random_points_of_200_jobs(serve: Serve, tmp_path: Path) -> None:
    """No accepted job is lost, none is seen to end twice, and a repeated request makes no second job."""
    chance = random.Random(5)  # noqa: S311
    said, silent = clips("DA")[:8], clips("S")  # silence costs next to nothing, and is a job like others
    wanted = [chance.choice(chance.choice((said, silent))) for _number in range(200)]
    options = ("--data-dir", str(tmp_path / "data"), "--beam-size", "1", "--webhook-allow",
               "127.0.0.0/8", "--webhook-secret-file", str(tmp_path / "secret"))  # fmt: skip
    (tmp_path / "secret").write_text(f"whsec_{'A' * 43}=\n")
    receiver = Receiver()
    current, killed = [serve(*options)], list[Server]()
    ids: list[set[str]] = [set() for _clip in wanted]
    done = threading.Event()

    def submit() -> None:
        """As a client does: until there is an answer, with the same key."""
        for number, clip in enumerate(wanted):
            while not ids[number]:
                try:
                    _status, _headers, body = post(
                        current[0], clip.path, {"Idempotency-Key": f"request {number}"},
                        timestamp_granularities="segment", webhook_url=f"{receiver.url}/?{number}",
                    )  # fmt: skip
                    ids[number].add(body["id"])
                except (OSError, http.client.HTTPException):
                    time.sleep(0.05)
            time.sleep(0.02)
        done.set()

    submitting = threading.Thread(target=submit, daemon=True)
    submitting.start()
    seen: dict[str, str] = {}  # results that a client has seen

    def look(server: Server, statuses: str) -> list[str]:
        found: list[str] = []
        cursor = ""
        while True:
            page = get(server, f"/jobs?limit=100&status={statuses}{cursor}")
            found += [job["id"] for job in page["data"]]
            if not page["has_more"]:
                return found
            cursor = f"&after={page['last_id']}"

    for kill in range(5):
        server = current[0]
        if kill % 2 == 0:  # the others may come before the model is loaded
            server.wait_ready()
        time.sleep(chance.uniform(0.0, 2.0))
        for id in look(server, "done")[:20]:
            seen.setdefault(id, result(server, id))
        server.process.kill()
        server.process.wait(10)
        killed.append(server)
        current[0] = serve(*options, ready=False)
        current[0].wait_listening()
    assert done.wait(40)
    submitting.join(5)
    server = current[0]
    # The answer to each request is the same after all the kills.
    for number in chance.sample(range(200), 20):
        body = post(
            server, wanted[number].path, {"Idempotency-Key": f"request {number}"},
            timestamp_granularities="segment", webhook_url=f"{receiver.url}/?{number}",
        )[2]  # fmt: skip
        ids[number].add(body["id"])
    assert all(len(found) == 1 for found in ids)
    deadline = time.monotonic() + 40
    while look(server, "queued,running"):
        assert time.monotonic() < deadline, server.log[-2000:]
        time.sleep(0.2)
    assert sorted(look(server, "done")) == sorted(id for [id] in ids)
    for clip, [id] in zip(wanted, ids, strict=True):
        text = result(server, id)
        assert text == clip.text + "\n"
        assert seen.get(id, text) == text
    assert seen
    assert not list((tmp_path / "data" / "audio").iterdir())
    # Each end was told, under one id however often, and never as anything else.
    deadline = time.monotonic() + 20
    while len({call.headers["webhook-id"] for call in receiver.calls}) < 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    told = {(call.headers["webhook-id"], call.path, call.body) for call in receiver.calls}
    assert len(told) == 200
    assert {json.loads(body)["data"]["id"] for _id, _path, body in told} == {id for [id] in ids}
    receiver.close()
    assert server.log.count(" job_ended ") < 200  # the kills did come in the middle
    # Nor does any of the engines outlive its server.
    engines = {pid for server in killed for pid in re.findall(r" engine_started pid=(\d+)", server.log)}
    assert len(engines) == len(killed)
    assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()]
