# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of the role stt_server: check its variables and read what is on the controller."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt, _stt_plan, _stt_tree

GATEWAY_PARTS = ("src", "pyproject.toml", "requirements.lock")
_GATEWAY_SETTING = re.compile(r"^    (\w+): (?:str|int|bool) = _setting\(", re.MULTILINE)
# Settings of voicegate that follow from the roles' variables.
GATEWAY_ROLES_OWN = frozenset(
    ("host", "port", "model", "revision", "device", "compute_type", "language", "ttl", "api_key_file",
     "upstream", "upstream_model", "upstream_api_key_file", "wyoming_port", "data_dir", "webhook_secret_file",
     "diarization", "diarization_model",
     "vram_policy", "vram_need_mib", "vram_kept_mib", "vram_fallback", "ollama_url", "ollama_pinned",
     "ollama_reload")
)  # fmt: skip


def stt_problems(variables: Mapping[str, Any], base: str = "") -> list[str]:
    """Return what is wrong with the stt_server_* variables among the given ones."""
    return _stt.problems(variables, base)


def stt_problems_of_hosts(hosts: Iterable[str], hostvars: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the stt_server_* variables of each host, with its name before it."""
    found = []
    for host in hosts:
        variables = hostvars[host]
        asked = {name: variables[name] for name in variables if name.startswith("stt_server_")}
        found += [
            f"{host}: {problem}" for problem in stt_problems(asked, str(variables.get("inventory_dir") or ""))
        ]
    return found


def _choice(model: str, base: str) -> _stt.Choice:
    try:
        return _stt.resolve_model(model, base)
    except _stt.SttError:
        return _stt.Choice(asked=model, name="")  # already among the problems


def _model_digest(path: str, problems: list[str], name: str) -> str:
    """Return the digest of a model's folder on the controller; nothing when there is no such folder."""
    if not path or not os.path.isdir(path):
        return ""
    if not os.path.isfile(os.path.join(path, "model.bin")):
        problems.append(f"{name}: {path} holds no model.bin; it must be a model converted for CTranslate2.")
        return ""
    return _stt_tree.digest(Path(path))


def _expand(path: str, base: str) -> str:
    return os.path.normpath(os.path.join(base or ".", os.path.expanduser(path))) if path else ""


def _ctranslate2(root: Path, request: Mapping[str, Any]) -> dict[str, str]:
    """Return the version of CTranslate2 in each engine; empty where it is not known."""
    lock = root / "requirements.lock"
    found = (
        re.search(r"^ctranslate2==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
        if lock.is_file()
        else None
    )
    # Of another Speaches than the pinned one the lock is not looked at.
    pinned = request.get("speaches_digest")
    pinned_digest = pinned == _stt.SPEACHES_DIGEST and request["speaches_source_digest"] in ("", pinned)
    return {
        "builtin": found[1] if found else "",
        "speaches": _stt.SPEACHES_CTRANSLATE2 if pinned_digest else "",
    }


def _gateway_problems(root: Path, request: Mapping[str, Any]) -> list[str]:
    """What is wrong with the voice_gateway_* variables; the names are those in voicegate's own table."""
    settings, port = request["gateway"], request["port"]
    found = []
    if settings.get("diarization") and request["engine"] == "builtin":
        found.append(
            "voice_gateway_diarization: only the engine speaches tells speakers apart; set "
            "stt_server_engine: speaches, or voice_gateway_diarization: false."
        )
    if str(settings["engine_port"]) == str(port):
        found.append(
            f"voice_gateway_engine_port: {port} is the gateway's (stt_server_port); give the engine another."
        )
    table = root / "src" / "voicegate" / "settings.py"
    known = re.findall(
        r"^    (\w+): (?:str|int|bool) = _setting\(", table.read_text(encoding="utf-8"), re.MULTILINE
    )
    own = GATEWAY_ROLES_OWN.union(_stt_plan.LIVE_SETTINGS if request["engine"] == "builtin" else ())
    for name in settings["settings"]:
        if name in own:
            found.append(
                f"voice_gateway_settings: '{name}' follows from a variable of stt_server or voice_gateway."
            )
        elif name not in known:
            hint = _stt.did_you_mean(str(name), known)
            found.append(f"voice_gateway_settings: voicegate has no setting '{name}'.{hint}")
    return found


def stt_request(settings: Mapping[str, Any], gateway: str, base: str = "") -> dict[str, Any]:
    """Return what is asked of a machine: the settings (without prefix), with digests of local sources."""
    if not isinstance(settings, Mapping):
        raise AnsibleFilterError("stt_request takes a mapping of settings")
    request: dict[str, Any] = dict(settings)
    planned = request.pop("planned", None) or {}
    if request["model"] == _stt.AUTO:
        request["model"] = planned.get("model", _stt.DEFAULT_MODEL)
    if request["quantization"] == _stt.AUTO and planned:
        request["quantization"] = planned["quantization"]
    settings = request.copy()
    problems = _stt.problems({f"stt_server_{name}": value for name, value in settings.items()}, base)
    if request.get("gateway"):
        problems += _gateway_problems(Path(gateway), request)
    choice = _choice(str(settings["model"]), base)
    live = str(settings.get("live_model") or "")
    live_choice = _choice(live, base) if live else None
    if request.get("tts_model"):
        # The built-in engine does not speak, and Open WebUI is told beforehand that somebody does.
        request["engine_fallback"] = ""
    request["model"] = asdict(choice)
    request["model_digest"] = _model_digest(choice.path, problems, "stt_server_model")
    request["live_model"] = asdict(live_choice) if live_choice else {}
    request["live_model_digest"] = _model_digest(
        live_choice.path if live_choice else "", problems, "stt_server_live_model"
    )
    fallback = _expand(str(settings.get("fallback_model") or ""), base)
    request["fallback_path"] = fallback
    request["fallback_digest"] = _model_digest(fallback, problems, "stt_server_fallback_model")
    if fallback and not os.path.isdir(fallback):
        problems.append(f"stt_server_fallback_model: there is no folder {fallback} on the controller.")
    source = _expand(str(settings.get("speaches_source") or ""), base)
    request["speaches_source"] = source
    request["speaches_source_digest"] = ""
    if source:
        try:
            request["speaches_source_digest"] = _stt_tree.source_digest(Path(source))
        except (_stt_tree.TreeError, OSError) as error:
            problems.append(f"stt_server_speaches_source: {error}")
    root = Path(os.path.normpath(gateway))
    request["gateway_path"] = str(root)
    request["gateway_digest"] = _stt_tree.digest(root, GATEWAY_PARTS)
    request["gateway_version"] = ""
    if (root / "pyproject.toml").is_file():
        version = re.search(
            r'^version = "([^"]+)"', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
        )
        request["gateway_version"] = version[1] if version else ""
    elif "builtin" in (settings.get("engine"), settings.get("engine_fallback")):
        problems.append(f"the collection is not whole: there is no {root}/pyproject.toml.")
    request["ctranslate2"] = _ctranslate2(root, request)
    cuda_lock = root / "requirements-cuda.lock"
    request["cuda_lock"] = _stt.stamp(cuda_lock.read_text(encoding="utf-8")) if cuda_lock.is_file() else ""
    request["problems"] = problems
    return request


class FilterModule:
    """Filters of sottovoce.stack for speech-to-text."""

    def filters(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "stt_problems": stt_problems,
            "stt_problems_of_hosts": stt_problems_of_hosts,
            "stt_request": stt_request,
            "stt_summary": _stt_plan.summarize,
        }
