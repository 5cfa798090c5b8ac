"""Everything that can be set, in one place, checked before anything starts."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voicegate import keys, languages, logs, models, webhook_rules
from voicegate.errors import ModelUnavailable, SettingsError
from voicegate.fallback import fallbacks

DEVICES = ("auto", "cpu", "cuda")
COMPUTE_TYPES = (
    "auto",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
    "int16",
    "float16",
    "bfloat16",
    "float32",
)
POLICIES = ("resident", "yield", "exclusive")
DIARIZATION = ("off", "upstream", "pyannote")
LOG_LEVELS = ("debug", "info", "warning", "error")
PREFIX = "VOICEGATE_"
# Read from <name>_file or the environment.
SECRETS = ("api_key", "upstream_api_key", "webhook_secret")
HEADER_SECRETS = ("api_key", "upstream_api_key")
_URL = re.compile(r"^https?://[^\s/?#@]+(/[^\s?#]*)?$")


def _setting(
    default: Any, help: str, *, choices: tuple[str, ...] = (), low: int | None = None, high: int | None = None
) -> Any:
    meta = {"help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Settings:
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on (0: any free one)", low=0, high=65535)
    model: str = _setting("large-v3-turbo", "name, hub id (organisation/name) or local folder of the model")
    revision: str = _setting("", "commit, tag or branch of the hub repository (default: the cached main)")
    device: str = _setting("auto", "auto takes a GPU if one works", choices=DEVICES)
    device_index: int = _setting(0, "which GPU", low=0)
    compute_type: str = _setting(
        "auto", "what the device cannot do is replaced, with a line in the log", choices=COMPUTE_TYPES
    )
    cpu_threads: int = _setting(
        0, "threads for one transcription on a CPU (0: as many as cores, at most 8)", low=0
    )
    language: str = _setting("", "language of requests that name none (default: detect it)")
    beam_size: int = _setting(5, "width of the beam search", low=1, high=20)
    vad: bool = _setting(True, "leave silence out before transcribing")
    ttl: int = _setting(
        -1, "seconds without work until the model is unloaded (-1: never, 0: at once)", low=-1
    )
    queue_limit: int = _setting(16, "requests that may wait; more get status 429", low=0)
    max_upload_mib: int = _setting(200, "largest upload in MiB; more gets status 413", low=1)
    max_audio_minutes: int = _setting(240, "longest audio taken, in minutes", low=1)
    upload_dir: str = _setting("", "folder for uploads larger than 1 MiB (default: the system's)")
    max_decode_seconds: int = _setting(300, "longest time that decoding one upload may take", low=1)
    cors_origins: str = _setting(
        "", "web pages of other origins that may ask, with commas between; * is any (default: none)"
    )
    log_format: str = _setting("text", "lines of key=value, or of JSON", choices=logs.FORMATS)
    log_text: bool = _setting(False, "log what was said, too")
    api_keys_file: str = _setting(
        "", "file with several keys, a line NAME:SHA256[:LIMITS] each (see 'voicegate key')"
    )
    vram_policy: str = _setting(
        "resident",
        "resident stays loaded, yield and Ollama's idle models make room for each other, exclusive is alone",
        choices=POLICIES,
    )
    vram_need_mib: int = _setting(
        0, "VRAM the loaded model needs at its peak, in MiB (0: the card is not looked at)", low=0
    )
    vram_kept_mib: int = _setting(
        0, "how much of that an upstream keeps when its model has gone, in MiB", low=0
    )
    vram_reserve_mib: int = _setting(0, "VRAM to leave free beside it, in MiB", low=0)
    vram_wait: int = _setting(30, "seconds to wait for VRAM before a fallback is taken", low=0)
    vram_fallback: str = _setting(
        "", "what may be loaded where the model finds no room, such as int8=1500,cpu (default: nothing)"
    )
    ollama_url: str = _setting("", "Ollama that shares the card, such as http://127.0.0.1:11434")
    ollama_pinned: str = _setting("", "models of Ollama that are never asked to go, with commas")
    ollama_reload: bool = _setting(False, "load again what went for the speech model, when that has gone")
    wyoming_port: int = _setting(
        -1, "port for the Wyoming protocol of home automation (-1: off, 0: any free one)", low=-1, high=65535
    )
    upstream: str = _setting(
        "", "URL of a speech server with OpenAI's API that does the work (default: the model runs here)"
    )
    upstream_model: str = _setting("", "what that server calls the model [--model]")
    upstream_timeout: int = _setting(3600, "seconds that server may take for one request", low=1)
    upstream_parallel: int = _setting(1, "requests sent to that server at once; live speech one more", low=1)
    upstream_api_key_file: str = _setting("", "file with the key that server wants")
    data_dir: str = _setting(
        "", "folder for jobs: a database, and the audio of those not finished (default: no jobs)"
    )
    live_model: str = _setting(
        "", "small model for what is being said, until it was said (default: the same as for the rest)"
    )
    live_revision: str = _setting(
        "", "commit, tag or branch of the small model's hub repository (default: the cached main)"
    )
    live_limit: int = _setting(8, "live sessions at the same time (0: none); more get status 429", low=0)
    live_resume_seconds: int = _setting(
        30, "how long a live session waits for a client that was cut off", low=0
    )
    job_limit: int = _setting(1000, "jobs that may wait or run; more get status 429", low=1)
    job_retention_hours: int = _setting(
        168, "how long finished jobs are kept (0: until the quota needs the room)", low=0
    )
    job_quota_mib: int = _setting(
        4096, "audio of unfinished and results of finished jobs, in MiB; the oldest finished go first", low=1
    )
    webhook_secret_file: str = _setting(
        "", "file with the secret that signs webhooks, whsec_BASE64 (default: no webhooks)"
    )
    webhook_allow: str = _setting(
        "",
        "networks and host names that webhooks may call although they are loopback, link-local or metadata",
    )
    max_decode_mib: int = _setting(
        256, "memory of the process that decodes one upload, in MiB; its samples do not count", low=64
    )
    diarization: str = _setting(
        "off",
        "who tells speakers apart: the upstream (Speaches), or pyannote.audio here",
        choices=DIARIZATION,
    )
    diarization_model: str = _setting(
        "pyannote/speaker-diarization-community-1", "pipeline of pyannote.audio: hub id, or a local folder"
    )
    api_key_file: str = _setting(
        "", "file with the bearer key clients must send (an empty one: no key needed)"
    )
    log_level: str = _setting("info", "how much to log", choices=LOG_LEVELS)
    # No options: a key on a command line is in every process list.
    api_key: str = field(default="", repr=False)
    upstream_api_key: str = field(default="", repr=False)
    webhook_secret: str = field(default="", repr=False)

    @classmethod
    def load(cls, given: Mapping[str, str | None], environ: Mapping[str, str] | None = None) -> Settings:
        """From options (`given`), else the environment, else defaults. SettingsError names every problem."""
        environ = os.environ if environ is None else environ
        problems: list[str] = []
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            option = given.get(item.name)
            text = environ.get(PREFIX + item.name.upper()) if option is None else option
            if text is None:
                continue
            where = PREFIX + item.name.upper() if option is None else _flag(item.name)
            try:
                values[item.name] = _value(item, text)
            except ValueError as error:
                problems.append(f"{where}: {error}")
        settings = cls(**values)
        settings, more = _check(settings)
        problems += more
        if problems:
            raise SettingsError(problems)
        return settings


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(item: dataclasses.Field[Any], text: str) -> Any:
    text = text.strip()
    if item.type == "bool":
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ValueError(f"{text!r} is neither true nor false")
    if item.type == "int":
        if text == "":
            return item.default
        try:
            number = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
        low, high = item.metadata["low"], item.metadata["high"]
        if low is not None and number < low:
            raise ValueError(f"{number} is less than {low}")
        if high is not None and number > high:
            raise ValueError(f"{number} is more than {high}")
        return number
    if choices := item.metadata.get("choices", ()):
        if text == "":
            return item.default
        if text.lower() not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text.lower()
    return text


def _check(settings: Settings) -> tuple[Settings, list[str]]:
    problems: list[str] = []
    changes: dict[str, Any] = {}
    try:
        models.resolve(settings.model)
    except ModelUnavailable as error:
        problems.append(f"--model: {error}")
    if settings.live_model and not settings.upstream:
        try:
            models.resolve(settings.live_model)
        except ModelUnavailable as error:
            problems.append(f"--live-model: {error}")
    if settings.language:
        code = languages.code_of(settings.language)
        if settings.language.casefold() == "auto":
            changes["language"] = ""
        elif code is None:
            problems.append(
                f"--language: {settings.language!r} is no language Whisper knows; use a code such as"
                f" {', '.join(languages.NAMES)}"
            )
        else:
            changes["language"] = code
    if settings.upload_dir and not os.access(settings.upload_dir, os.W_OK | os.X_OK):
        problems.append(f"--upload-dir: cannot write to {settings.upload_dir}")
    if settings.webhook_secret_file or settings.webhook_secret:
        where = "--webhook-secret-file" if settings.webhook_secret_file else f"{PREFIX}WEBHOOK_SECRET"
        try:
            text = settings.webhook_secret
            if settings.webhook_secret_file:
                text = Path(settings.webhook_secret_file).read_text(encoding="ascii")
            webhook_rules.secrets_from(text)
        except (OSError, ValueError) as error:
            problems.append(f"{where}: {error}")
        else:
            changes["webhook_secret"] = text
    for name in HEADER_SECRETS:
        if path := getattr(settings, f"{name}_file"):
            try:
                changes[name] = Path(path).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{_flag(name)}-file: {error}")
        key = changes.get(name, getattr(settings, name))
        if not key.isascii() or not key.isprintable():
            problems.append(
                f"{PREFIX + name.upper()}: a key is one line of plain ASCII; it travels in an HTTP header"
            )
    for name in ("upstream", "ollama_url"):
        if (url := getattr(settings, name)) and not _URL.match(url):
            problems.append(f"{_flag(name)}: {url!r} is no URL such as http://127.0.0.1:8001")
    if settings.diarization == "upstream" and not settings.upstream:
        problems.append("--diarization: upstream needs --upstream, the URL of a Speaches")
    try:
        fallbacks(settings.vram_fallback)
    except ValueError as error:
        problems.append(f"--vram-fallback: {error}")
    if settings.vram_fallback and settings.upstream:
        problems.append("--vram-fallback: what --upstream loads is set there; leave this out")
    if settings.vram_policy == "exclusive" and settings.ttl < 0:
        changes["ttl"] = 0  # who is alone on the card goes when idle
    try:
        webhook_rules.Allowed.parse(settings.webhook_allow)
    except ValueError as error:
        problems.append(f"--webhook-allow: {error}")
    if settings.api_keys_file:
        try:
            keys.read(settings.api_keys_file)
        except (OSError, ValueError) as error:
            problems.append(f"--api-keys-file: {error}")
    return dataclasses.replace(settings, **changes), problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per setting. Values stay text: `Settings.load` checks options and environment alike."""
    for item in dataclasses.fields(Settings):
        if item.name in SECRETS:
            continue
        help = item.metadata["help"]
        if choices := item.metadata["choices"]:
            help = f"{', '.join(choices)}; {help}"
        if item.default not in ("", None):
            shown = str(item.default).lower() if item.type == "bool" else item.default
            help = f"{help} [{shown}]"
        if item.type == "bool":
            group = parser.add_mutually_exclusive_group()
            group.add_argument(
                _flag(item.name), dest=item.name, action="store_const", const="true", help=help
            )
            no = _flag(f"no_{item.name}")
            group.add_argument(no, dest=item.name, action="store_const", const="false", help="the opposite")
        else:
            parser.add_argument(
                _flag(item.name),
                dest=item.name,
                metavar=item.type.upper() if item.type == "int" else "TEXT",
                help=help.replace("%", "%%"),
            )
