# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Open WebUI's settings over its API, and the secrets it starts with.

Open WebUI copies its environment into its database at the first start and never looks at it again. Its
routes C(/api/v1/configs/…) change single settings in the running process, without a restart.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

HIDDEN = "(hidden)"
HIDDEN_AND_NEW = "(hidden, changed)"
_SECRET_NAME = re.compile(r"(api_?key|password|secret|token|credential|connection_string)", re.IGNORECASE)


class OpenWebuiError(Exception):
    """A message for the user."""


class OpenWebuiUnreachable(OpenWebuiError):
    """Nothing answers at the URL."""


# ── Settings: what is wanted, what has to change, what may be shown ──────────────────────────────────


@dataclass(frozen=True)
class Speech:
    """A speech server as Open WebUI's engine C(openai); an empty URL means none."""

    url: str = ""
    api_key: str = ""
    model: str = ""
    voice: str = ""


def stt_settings(stt: Speech) -> dict[str, Any]:
    if not stt.url:
        return {"audio.stt.engine": ""}
    return {
        "audio.stt.engine": "openai",
        "audio.stt.openai.api_base_url": stt.url.rstrip("/"),
        "audio.stt.openai.api_key": stt.api_key,
        "audio.stt.model": stt.model,
    }


def tts_settings(tts: Speech) -> dict[str, Any]:
    if not tts.url:
        return {"audio.tts.engine": ""}
    return {
        "audio.tts.engine": "openai",
        "audio.tts.openai.api_base_url": tts.url.rstrip("/"),
        "audio.tts.openai.api_key": tts.api_key,
        "audio.tts.model": tts.model,
        "audio.tts.voice": tts.voice,
    }


def ollama_settings(url: str, current: Mapping[str, Any]) -> dict[str, Any]:
    """The first connection is ours; those that somebody added on the web page stay behind it."""
    if not url:
        return {"ollama.enable": False}
    url = url.rstrip("/")
    known = current.get("ollama.base_urls")
    others = [str(item) for item in known[1:]] if isinstance(known, list) else []
    return {
        "ollama.enable": True,
        "ollama.base_urls": [url, *(item for item in others if item.rstrip("/") != url)],
        "rag.ollama.base_url": url,
    }


def changes(current: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to send: those that are missing or different."""
    return {key: value for key, value in wanted.items() if key not in current or current[key] != value}


def is_secret(key: str) -> bool:
    return bool(_SECRET_NAME.search(key))


def _shown(key: str, value: Any, *, changed: bool) -> str:
    if value is None:
        return "(not set)"
    if value and (
        is_secret(key) or (isinstance(value, dict | list) and _SECRET_NAME.search(json.dumps(value)))
    ):
        return HIDDEN_AND_NEW if changed else HIDDEN
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def settings_diff(current: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, str]:
    """Before and after of the settings that change, one a line, without secrets."""
    before = "".join(f"{key}: {_shown(key, current.get(key), changed=False)}\n" for key in sorted(update))
    after = "".join(f"{key}: {_shown(key, update[key], changed=True)}\n" for key in sorted(update))
    return {"before_header": "Open WebUI", "after_header": "Open WebUI", "before": before, "after": after}


# ── API ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any


Transport = Callable[[str, str, "Mapping[str, Any] | None", "str | None"], Answer]


def http_transport(base_url: str, timeout: float) -> Transport:
    """JSON over HTTP to the service itself: proxies of the environment are not asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    base = base_url.rstrip("/")

    def send(method: str, path: str, body: Mapping[str, Any] | None, token: str | None) -> Answer:
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(base + path, data=data, headers=headers, method=method)  # noqa: S310
        try:
            with opener.open(request, timeout=timeout) as reply:
                status, raw = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, raw = error.code, error.read()
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise OpenWebuiUnreachable(f"Open WebUI does not answer at {base}: {reason}") from error
        try:
            return Answer(status, json.loads(raw) if raw else None)
        except ValueError:
            return Answer(status, raw.decode(errors="replace")[:300])

    return send


def _detail(answer: Answer) -> str:
    detail = answer.body.get("detail") if isinstance(answer.body, dict) else answer.body
    return f"{answer.status}: {detail}" if detail else str(answer.status)


class OpenWebui:
    """The few routes that are needed, as an administrator."""

    def __init__(self, send: Transport, email: str, password: str, token: str | None = None) -> None:
        self._send = send
        self._email = email
        self._password = password
        self.token = token

    def sign_in(self) -> None:
        answer = self._send(
            "POST", "/api/v1/auths/signin", {"email": self._email, "password": self._password}, None
        )
        token = answer.body.get("token") if isinstance(answer.body, dict) else None
        if answer.status == 429:
            raise OpenWebuiError(
                f"Open WebUI has seen too many sign-ins of {self._email}; try again in three minutes"
            )
        if answer.status in (400, 401, 403):
            raise OpenWebuiError(
                f"Open WebUI does not let {self._email} in ({_detail(answer)}). If the password was changed "
                "on the web page, put the new one into open_webui_admin_password, or into the credentials "
                "file on the machine"
            )
        if not token:
            raise OpenWebuiError(
                f"Open WebUI gave no session to {self._email} ({_detail(answer)}); an account with a "
                "second factor cannot be used here"
            )
        self.token = str(token)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """With the token there is; a token that is no longer good costs one sign-in."""
        fresh = self.token is None
        if fresh:
            self.sign_in()
        answer = self._send(method, path, body, self.token)
        if answer.status == 401 and not fresh:
            self.sign_in()
            answer = self._send(method, path, body, self.token)
        if answer.status in (401, 403):
            raise OpenWebuiError(f"{self._email} is no administrator of this Open WebUI ({_detail(answer)})")
        if answer.status != 200:
            raise OpenWebuiError(f"{method} {path} failed ({_detail(answer)})")
        return answer.body

    def settings(self) -> dict[str, Any]:
        body = self._call("GET", "/api/v1/configs/export")
        if not isinstance(body, dict):
            raise OpenWebuiError("Open WebUI's settings are not in the form this module knows")
        return body

    def change(self, update: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings after the change; one that did not take is an error."""
        body = self._call("POST", "/api/v1/configs/import", {"config": dict(update)})
        after = body if isinstance(body, dict) else {}
        refused = sorted(changes(after, update))
        if refused:
            raise OpenWebuiError(f"Open WebUI did not take: {', '.join(refused)}")
        return after


# ── Summary ─────────────────────────────────────────────────────────────────────────────────────────


def summary(
    version: str,
    *,
    address: str,
    port: int,
    enabled: bool,
    ollama_url: str,
    stt_url: str,
    email: str,
    machine: str,
    credentials_file: str,
) -> dict[str, Any]:
    """What the role tells at the end."""
    if not enabled:
        return {
            "engine": "Open WebUI",
            "version": version,
            "skipped": [{"what": "Open WebUI", "why": "open_webui_enabled is false"}],
        }
    wired = {
        "Ollama": ("open_webui_ollama_url", ollama_url),
        "speech-to-text": ("open_webui_stt_url", stt_url),
    }
    return {
        "url": f"http://{address}:{port}",
        "engine": "Open WebUI",
        "version": version,
        "skipped": [
            {"what": f"{what} in Open WebUI", "why": f"{variable} is empty"}
            for what, (variable, url) in wired.items()
            if not url
        ],
        "notes": [f"Sign in as {email}; the password is in {credentials_file} on {machine}."],
    }


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Credentials:
    email: str
    password: str

    @classmethod
    def load(cls, path: str) -> Credentials:
        try:
            with open(path, encoding="utf-8") as stream:
                data = json.load(stream)
            return cls(email=str(data["email"]), password=str(data["password"]))
        except FileNotFoundError as error:
            raise OpenWebuiError(
                f"{path} is not there; it holds the administrator's email and password"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OpenWebuiError(
                f"{path} cannot be read as JSON with email and password ({type(error).__name__})"
            ) from error


def parse_environment(text: str) -> dict[str, str]:
    """The lines of an environment file of ours: NAME="value"."""
    values = {}
    for line in text.splitlines():
        match = re.fullmatch(r'\s*([A-Z_][A-Z0-9_]*)="((?:[^"\\]|\\.)*)"\s*', line)
        if match:
            values[match[1]] = re.sub(r"\\(.)", r"\1", match[2])
    return values


def render_environment(values: Mapping[str, str]) -> str:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = [f"{name}={quoted(values[name])}" for name in sorted(values)]
    return "\n".join(["# Made once; Open WebUI's sessions are signed with the key.", *lines, ""])


@dataclass(frozen=True)
class Secrets:
    """The text of both files."""

    credentials: str
    environment: str
    key_made: bool


def make_secrets(
    *,
    email: str,
    password: str | None,
    credentials: str | None,
    environment: str | None,
    generate: Callable[[], str] = lambda: secrets.token_urlsafe(24),
) -> Secrets:
    """Keep what the files hold; make up what is missing. A password that is given wins."""
    try:
        known = json.loads(credentials) if credentials else {}
    except ValueError:
        known = {}
    if not isinstance(known, dict):
        known = {}
    values = parse_environment(environment or "")
    account = {
        # The account exists under the first email; a later one would name somebody else.
        "email": str(known.get("email") or email),
        "password": password or str(known.get("password") or generate()),
    }
    if any("\n" in value for value in account.values()):
        raise OpenWebuiError("email and password must be one line each")
    key = values.get("WEBUI_SECRET_KEY")
    values = {
        "WEBUI_ADMIN_EMAIL": account["email"],
        "WEBUI_ADMIN_PASSWORD": account["password"],
        "WEBUI_SECRET_KEY": key or generate(),
    }
    return Secrets(
        credentials=json.dumps({**known, **account}, indent=1) + "\n",
        environment=render_environment(values),
        key_made=not key,
    )


def read_text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def is_private(path: str) -> bool:
    """Root's (or ours) alone."""
    status = os.stat(path)
    return status.st_mode & 0o777 == 0o600 and status.st_uid == os.geteuid()


def write_private(path: str, text: str) -> None:
    """Whole or not at all, and never readable for others, not even for a moment."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    scratch = f"{path}.new"
    if os.path.lexists(scratch):
        os.unlink(scratch)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, path)
