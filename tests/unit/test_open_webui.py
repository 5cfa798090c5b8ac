"""Open WebUI: which settings are sent, what may be shown, sign-in, and the secrets made once."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _open_webui as webui

ROOT = Path(__file__).resolve().parents[2]


class FakeWebui(http.server.ThreadingHTTPServer):
    """The routes that are used, as Open WebUI 0.12.4 answers them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.settings: dict[str, Any] = {
            "audio.stt.engine": "",
            "audio.tts.engine": "",
            "ollama.enable": True,
            "ollama.base_urls": ["http://localhost:11434"],
            "ui.enable_signup": False,
        }
        self.accounts = {"admin@localhost": ("right", "admin"), "guest@localhost": ("right", "user")}
        self.tokens: dict[str, str] = {}
        self.calls: list[str] = []
        self.limited = False
        self.ignored: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeWebui

    def log_message(self, *_: object) -> None: ...

    def _answer(self, status: int, body: object) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _role(self) -> str | None:
        return self.server.tokens.get((self.headers["Authorization"] or "").removeprefix("Bearer "))

    def do_GET(self) -> None:
        self.server.calls.append(f"GET {self.path}")
        role = self._role()
        if role is None:
            return self._answer(401, {"detail": "401 Unauthorized"})
        if role != "admin":
            return self._answer(401, {"detail": "You do not have permission to access this resource."})
        return self._answer(200, self.server.settings)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append(f"POST {self.path}")
        if self.path == "/api/v1/auths/signin":
            if self.server.limited:
                return self._answer(429, {"detail": "API rate limit exceeded"})
            password, role = self.server.accounts.get(body["email"], (None, ""))
            if password != body["password"]:
                return self._answer(400, {"detail": "The email or password provided is incorrect."})
            token = f"token-{len(self.server.tokens)}"
            self.server.tokens[token] = role
            return self._answer(200, {"token": token})
        if self._role() != "admin":
            return self._answer(401, {"detail": "401 Unauthorized"})
        self.server.settings.update({k: v for k, v in body["config"].items() if k not in self.server.ignored})
        return self._answer(200, self.server.settings)


@pytest.fixture
def server() -> Iterator[FakeWebui]:
    with FakeWebui() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join(5)


def client(server: FakeWebui, email: str = "admin@localhost", **more: Any) -> webui.OpenWebui:
    return webui.OpenWebui(webui.http_transport(server.url, 5), email, **{"password": "right", **more})


def run_module(name: str, arguments: Mapping[str, Any], *, check: bool = False) -> tuple[dict[str, Any], str]:
    """Run a module as Ansible does, in a process of its own; its result and all it printed."""
    payload = {"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check, "_ansible_diff": True}}
    done = subprocess.run(
        [sys.executable, "-m", f"ansible_collections.sottovoce.stack.plugins.modules.{name}"],
        input=json.dumps(payload),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT / ".collections")},
        check=False,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done.stdout + done.stderr


# ── Which settings ──────────────────────────────────────────────────────────────────────────────────


def test_speech_to_text_on_and_off() -> None:
    assert webui.stt_settings(webui.Speech(url="http://10.0.0.1:8000/v1/", api_key="k", model="tiny")) == {
        "audio.stt.engine": "openai",
        "audio.stt.openai.api_base_url": "http://10.0.0.1:8000/v1",
        "audio.stt.openai.api_key": "k",
        "audio.stt.model": "tiny",
    }
    assert webui.stt_settings(webui.Speech()) == {"audio.stt.engine": ""}


def test_text_to_speech_on_and_off() -> None:
    on = webui.tts_settings(webui.Speech(url="http://10.0.0.1:8000/v1", model="kokoro", voice="af_heart"))
    assert on["audio.tts.engine"] == "openai"
    assert on["audio.tts.voice"] == "af_heart"
    assert webui.tts_settings(webui.Speech()) == {"audio.tts.engine": ""}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (None, ["http://new:11434"]),
        (["http://old:11434"], ["http://new:11434"]),
        (["http://old:11434", "http://other:11434"], ["http://new:11434", "http://other:11434"]),
        (["http://old:11434", "http://new:11434/"], ["http://new:11434"]),
    ],
)
def test_our_ollama_comes_first_and_others_stay(known: list[str] | None, expected: list[str]) -> None:
    current = {} if known is None else {"ollama.base_urls": known}
    assert webui.ollama_settings("http://new:11434/", current)["ollama.base_urls"] == expected


def test_no_ollama_keeps_the_connections_for_later() -> None:
    assert webui.ollama_settings("", {"ollama.base_urls": ["http://old:11434"]}) == {"ollama.enable": False}


def test_only_what_differs_is_sent() -> None:
    current = {"a": 1, "b": [1], "c": ""}
    assert webui.changes(current, {"a": 1, "b": [2], "c": "", "d": None}) == {"b": [2], "d": None}


def test_the_diff_hides_secrets_and_says_that_they_changed() -> None:
    current = {"audio.stt.openai.api_key": "old-secret", "audio.stt.model": "tiny"}
    update = {
        "audio.stt.openai.api_key": "new-secret",
        "audio.stt.model": "base",
        "openai.api_configs": {"0": {"key": 1, "api_key": "nested-secret"}},
    }
    diff = webui.settings_diff(current, update)
    text = json.dumps(diff)
    assert "secret" not in text
    assert 'audio.stt.model: "tiny"' in diff["before"]
    assert 'audio.stt.model: "base"' in diff["after"]
    assert diff["before"] != diff["after"]
    assert "audio.stt.openai.api_key: (hidden)" in diff["before"]
    assert "audio.stt.openai.api_key: (hidden, changed)" in diff["after"]


# ── Talking to it ───────────────────────────────────────────────────────────────────────────────────


def test_settings_are_read_and_changed(server: FakeWebui) -> None:
    service = client(server)
    assert service.settings()["audio.stt.engine"] == ""
    service.change({"audio.stt.engine": "openai"})
    assert server.settings["audio.stt.engine"] == "openai"
    assert server.calls.count("POST /api/v1/auths/signin") == 1


def test_a_kept_session_spares_the_sign_in(server: FakeWebui) -> None:
    server.tokens["kept"] = "admin"
    client(server, token="kept").settings()
    assert "POST /api/v1/auths/signin" not in server.calls


def test_an_expired_session_costs_one_sign_in(server: FakeWebui) -> None:
    service = client(server, token="expired")
    assert service.settings()
    assert service.token in server.tokens
    assert server.calls.count("POST /api/v1/auths/signin") == 1


def test_a_changed_password_is_explained(server: FakeWebui) -> None:
    with pytest.raises(webui.OpenWebuiError, match="put the new one into open_webui_admin_password"):
        client(server, password="wrong").settings()


def test_somebody_else_is_no_administrator(server: FakeWebui) -> None:
    with pytest.raises(webui.OpenWebuiError, match="guest@localhost is no administrator"):
        client(server, email="guest@localhost").settings()


def test_too_many_sign_ins(server: FakeWebui) -> None:
    server.limited = True
    with pytest.raises(webui.OpenWebuiError, match="three minutes"):
        client(server).settings()


def test_a_setting_that_did_not_take_is_an_error(server: FakeWebui) -> None:
    server.ignored = {"audio.stt.model"}
    with pytest.raises(webui.OpenWebuiError, match=r"did not take: audio\.stt\.model"):
        client(server).change({"audio.stt.model": "tiny"})


def test_nobody_there() -> None:
    with pytest.raises(webui.OpenWebuiUnreachable, match="does not answer"):
        webui.http_transport("http://127.0.0.1:9", 2)("GET", "/", None, None)


def test_proxies_of_the_environment_are_not_asked(server: FakeWebui, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert client(server).settings()


# ── The module ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def arguments(server: FakeWebui, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "admin.json").write_text(json.dumps({"email": "admin@localhost", "password": "right"}))
    return {
        "url": server.url,
        "credentials_file": str(tmp_path / "admin.json"),
        "token_file": str(tmp_path / "admin.token"),
        "ollama": {"url": "http://10.0.0.1:11434"},
        "stt": {"url": "http://10.0.0.1:8000/v1", "api_key": "very-private", "model": "tiny"},
        "settings": {"ldap.app_password": "also-private"},
    }


def test_the_module_changes_once_and_then_nothing(server: FakeWebui, arguments: dict[str, Any]) -> None:
    would, _unused = run_module("open_webui_config", arguments, check=True)
    assert would["changed"]
    assert server.settings["audio.stt.engine"] == ""
    assert not Path(arguments["token_file"]).exists()
    first, printed = run_module("open_webui_config", arguments)
    assert first["settings_changed"] == would["settings_changed"]
    assert server.settings["audio.stt.openai.api_key"] == "very-private"
    assert server.settings["ollama.base_urls"] == ["http://10.0.0.1:11434"]
    assert "private" not in printed
    assert Path(arguments["token_file"]).stat().st_mode & 0o777 == 0o600
    sign_ins = server.calls.count("POST /api/v1/auths/signin")
    second, _unused = run_module("open_webui_config", arguments)
    assert not second["changed"]
    assert server.calls.count("POST /api/v1/auths/signin") == sign_ins


def test_the_module_before_anything_is_installed(tmp_path: Path, arguments: dict[str, Any]) -> None:
    arguments = {**arguments, "credentials_file": str(tmp_path / "missing.json"), "url": "http://127.0.0.1:9"}
    would, _unused = run_module("open_webui_config", arguments, check=True)
    assert would["changed"]
    assert "audio.stt.openai.api_base_url" in would["settings_changed"]
    failed, _unused = run_module("open_webui_config", arguments)
    assert failed["failed"]
    assert "missing" in failed["msg"]


def test_the_module_leaves_alone_what_is_not_named(server: FakeWebui, arguments: dict[str, Any]) -> None:
    only = {key: arguments[key] for key in ("url", "credentials_file", "token_file")}
    done, _unused = run_module("open_webui_config", {**only, "settings": {"ui.enable_signup": False}})
    assert not done["changed"]


# ── Secrets ─────────────────────────────────────────────────────────────────────────────────────────


def test_secrets_are_made_once(tmp_path: Path) -> None:
    arguments = {
        "path": str(tmp_path / "etc/admin.json"),
        "environment_file": str(tmp_path / "etc/secrets.env"),
    }
    would, _unused = run_module("open_webui_credentials", arguments, check=True)
    assert would["changed"]
    assert not (tmp_path / "etc").exists()
    first, printed = run_module("open_webui_credentials", arguments)
    assert first["changed"]
    assert first["key_made"]
    account = json.loads(Path(arguments["path"]).read_text())
    values = webui.parse_environment(Path(arguments["environment_file"]).read_text())
    assert values["WEBUI_ADMIN_PASSWORD"] == account["password"]
    assert len(account["password"]) >= 24
    assert account["password"] not in printed
    assert values["WEBUI_SECRET_KEY"] not in printed
    for name in arguments.values():
        assert Path(name).stat().st_mode & 0o777 == 0o600
    before = [Path(name).read_bytes() for name in arguments.values()]
    second, _unused = run_module("open_webui_credentials", arguments)
    assert not second["changed"]
    assert not second["key_made"]
    assert [Path(name).read_bytes() for name in arguments.values()] == before


def test_open_permissions_are_closed_again(tmp_path: Path) -> None:
    arguments = {"path": str(tmp_path / "admin.json"), "environment_file": str(tmp_path / "secrets.env")}
    run_module("open_webui_credentials", arguments)
    Path(arguments["path"]).chmod(0o644)
    again, _unused = run_module("open_webui_credentials", arguments)
    assert again["changed"]
    assert Path(arguments["path"]).stat().st_mode & 0o777 == 0o600


def made(**more: Any) -> webui.Secrets:
    values: dict[str, Any] = {"email": "a@b", "password": None, "credentials": None, "environment": None}
    return webui.make_secrets(**{**values, **more})


def test_a_given_password_wins_and_the_key_stays() -> None:
    first = made()
    second = made(password='se"cr\\et', credentials=first.credentials, environment=first.environment)
    assert json.loads(second.credentials)["password"] == 'se"cr\\et'
    before, after = webui.parse_environment(first.environment), webui.parse_environment(second.environment)
    assert after["WEBUI_SECRET_KEY"] == before["WEBUI_SECRET_KEY"]
    assert after["WEBUI_ADMIN_PASSWORD"] == 'se"cr\\et'
    assert not second.key_made


def test_the_account_keeps_its_name() -> None:
    first = made()
    second = made(email="other@b", credentials=first.credentials, environment=first.environment)
    assert json.loads(second.credentials)["email"] == "a@b"


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '"text"'])
def test_a_damaged_file_is_replaced(broken: str) -> None:
    assert json.loads(made(credentials=broken).credentials)["password"]


def test_a_password_of_two_lines_is_refused() -> None:
    with pytest.raises(webui.OpenWebuiError, match="one line"):
        made(password="a\nWEBUI_SECRET_KEY=b")


# ── Summary ─────────────────────────────────────────────────────────────────────────────────────────


def summary(**more: Any) -> dict[str, Any]:
    values = {
        "address": "10.0.0.2", "port": 3000, "enabled": True, "ollama_url": "http://a", "stt_url": "http://b",
        "email": "admin@localhost", "machine": "webui", "credentials_file": "/etc/x.json",
    }  # fmt: skip
    return webui.summary("0.12.4", **{**values, **more})


def test_the_summary_says_where_and_how_to_sign_in() -> None:
    told = summary()
    assert told["url"] == "http://10.0.0.2:3000"
    assert told["skipped"] == []
    assert told["notes"] == ["Sign in as admin@localhost; the password is in /etc/x.json on webui."]


def test_the_summary_names_what_is_not_wired() -> None:
    assert summary(stt_url="")["skipped"] == [
        {"what": "speech-to-text in Open WebUI", "why": "open_webui_stt_url is empty"}
    ]
    assert "url" not in summary(enabled=False)
