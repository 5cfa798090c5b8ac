# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Speaches' management API: is a model there, download it, load it for real."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.parse
import uuid
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from ansible.module_utils.urls import open_url


class ApiError(Exception):
    """The server did not do what was asked; the message is for the user."""


@dataclass(frozen=True)
class Answer:
    status: int
    text: str

    def json(self) -> Any:
        try:
            return json.loads(self.text)
        except ValueError as error:
            raise ApiError(f"the server's answer is no JSON: {self.text[:200]!r}") from error

    def detail(self) -> str:
        """Return what an error of the server says."""
        try:
            body = json.loads(self.text)
        except ValueError:
            return self.text.strip()[:400]
        if isinstance(body, Mapping):
            return str(body.get("detail") or body.get("message") or body)[:400]
        return str(body)[:400]


Transport = Callable[[str, str, Optional[bytes], Mapping[str, str], float], Answer]


def http(method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout: float) -> Answer:
    """One request. An error status is an answer; no answer is an ApiError."""
    try:
        # A server in the same machine or network: a proxy has no business there.
        with open_url(
            url, method=method, data=body, headers=dict(headers), timeout=timeout, use_proxy=False
        ) as response:
            return Answer(response.status, response.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode("utf-8", "replace"))
    except TimeoutError as error:
        raise ApiError(f"{url} did not answer within {timeout:g} s") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise ApiError(f"{url} did not answer within {timeout:g} s") from error
        raise ApiError(f"{url} cannot be reached: {reason}") from error


def silence(seconds: float = 0.3) -> bytes:
    """Return a WAV file without a sound."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(16000)
        audio.writeframes(b"\0\0" * int(16000 * seconds))
    return buffer.getvalue()


def form(fields: Mapping[str, str], filename: str, content: bytes) -> tuple[bytes, str]:
    """Return a multipart body with one file, and its content type."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    )
    body = "".join(parts).encode() + head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


class Speaches:
    """The calls that stt_model needs."""

    def __init__(
        self,
        url: str,
        api_key: str = "",
        *,
        timeout: float = 30.0,
        download_timeout: float = 3600.0,
        transport: Transport = http,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout = timeout
        self.download_timeout = download_timeout
        self.transport = transport

    def _call(
        self, method: str, path: str, body: bytes | None = None, kind: str = "", timeout: float | None = None
    ) -> Answer:
        headers = {**self.headers, **({"Content-Type": kind} if kind else {})}
        answer = self.transport(method, self.url + path, body, headers, timeout or self.timeout)
        if answer.status in (401, 403) and "gated" not in answer.text:
            raise ApiError(f"{self.url} refused the API key (HTTP {answer.status}): {answer.detail()}")
        return answer

    @staticmethod
    def _path(model: str) -> str:
        return urllib.parse.quote(model, safe="/")

    def present(self, model: str) -> bool:
        """Is the model on the server's disk."""
        answer = self._call("GET", f"/v1/models/{self._path(model)}")
        if answer.status == 200:
            return True
        if answer.status == 404:
            return False
        raise ApiError(f"asking for {model} gave HTTP {answer.status}: {answer.detail()}")

    def download(self, model: str) -> bool:
        """Have the server download the model; True when it did, False when it was there already."""
        answer = self._call("POST", f"/v1/models/{self._path(model)}", b"", timeout=self.download_timeout)
        if answer.status in (200, 201):
            return answer.status == 200
        if answer.status == 404:
            raise ApiError(
                f"the model hub has no {model} that Speaches can use "
                "(it must be a CTranslate2 model for automatic speech recognition)"
            )
        if answer.status in (401, 403):
            raise ApiError(f"{model} is gated on the model hub: {answer.detail()}")
        raise ApiError(
            f"downloading {model} gave HTTP {answer.status}: {answer.detail()}. "
            "Check that the server reaches the model hub (its journal says more)."
        )

    def loaded(self, model: str) -> bool:
        """Does the server list the model as loaded. It also lists one whose loading failed."""
        answer = self._call("GET", "/api/ps")
        if answer.status != 200:
            raise ApiError(f"asking for the loaded models gave HTTP {answer.status}: {answer.detail()}")
        return model in answer.json().get("models", [])

    def load(self, model: str) -> None:
        """Load the model and wait for it."""
        answer = self._call("POST", f"/api/ps/{self._path(model)}", b"", timeout=self.download_timeout)
        if answer.status == 201:
            return
        if answer.status == 409:
            # Someone else's request made it listed, which is no proof: only one that needs the model is.
            self.try_out(model)
            return
        # A model whose loading failed stays listed as loaded; the next run must not believe that.
        self._call("DELETE", f"/api/ps/{self._path(model)}")
        raise ApiError(
            f"loading {model} gave HTTP {answer.status}: {answer.detail()}. The server's journal says why."
        )

    def try_out(self, model: str) -> None:
        """Transcribe a moment of silence."""
        body, kind = form({"model": model, "response_format": "json"}, "silence.wav", silence())
        answer = self._call("POST", "/v1/audio/transcriptions", body, kind, timeout=self.download_timeout)
        if answer.status != 200:
            raise ApiError(f"{model} does not load: HTTP {answer.status}: {answer.detail()}")

    def remove(self, model: str) -> None:
        """Remove the model from the server's disk."""
        answer = self._call("DELETE", f"/v1/models/{self._path(model)}")
        if answer.status not in (200, 404):
            raise ApiError(f"removing {model} gave HTTP {answer.status}: {answer.detail()}")

    def unload(self, model: str) -> bool:
        """Take the model out of memory; False when it was not loaded."""
        answer = self._call("DELETE", f"/api/ps/{self._path(model)}")
        if answer.status == 409:
            raise ApiError(f"{model} is in use; it was not unloaded")
        if answer.status not in (200, 404):
            raise ApiError(f"unloading {model} gave HTTP {answer.status}: {answer.detail()}")
        return answer.status == 200


@dataclass(frozen=True)
class State:
    present: bool
    loaded: bool

    def text(self) -> str:
        return f"present: {str(self.present).lower()}\nloaded: {str(self.loaded).lower()}\n"


def observe(server: Speaches, model: str) -> State:
    present = server.present(model)
    return State(present, present and server.loaded(model))


def wanted(state: str, before: State) -> State:
    """Return what the server should be like; 'present' leaves loading alone."""
    match state:
        case "absent":
            return State(False, False)
        case "loaded":
            return State(True, True)
        case _:
            return State(True, before.loaded)


def converge(server: Speaches, model: str, state: str, before: State) -> None:
    """Bring the server from before to the wanted state."""
    after = wanted(state, before)
    if before.loaded and not after.present:
        server.unload(model)
    if before.present and not after.present:
        server.remove(model)
    if after.present and not before.present:
        server.download(model)
    if after.loaded and not before.loaded:
        server.load(model)


def wait_until_up(
    server: Speaches,
    patience: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait for /health; the last error is the message."""
    deadline = clock() + patience
    while True:
        try:
            answer = server.transport("GET", server.url + "/health", None, {}, 5.0)
            if answer.status == 200:
                return
            problem = f"{server.url}/health gives HTTP {answer.status}"
        except ApiError as error:
            problem = str(error)
        if clock() >= deadline:
            raise ApiError(f"Speaches is not up: {problem}")
        sleep(0.5)
