# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Speech-to-text: the table of models and the decisions of the role stt_server. No I/O here."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ENGINES = ("speaches", "builtin")
UNITS = {"speaches": "speaches", "builtin": "voicegate"}
DEVICES = ("auto", "cpu", "cuda")
# `auto` is the best that card or CPU can do.
QUANTIZATIONS = (
    "auto",
    "float16",
    "int8_float16",
    "int8",
    "float32",
    "bfloat16",
    "int8_bfloat16",
    "int8_float32",
    "int16",
)
# CTranslate2 silently computes these as float32 on a CPU: slower and four times the memory of int8.
ONLY_ON_GPU = ("float16", "int8_float16", "bfloat16", "int8_bfloat16")
DEFAULT_MODEL = "large-v3-turbo"
AUTO = "auto"
# CTranslate2 in the lock file of the Speaches with this digest, the one that the role pins. The builtin
# engine's is in gateway/requirements.lock.
SPEACHES_DIGEST = "861b0a8cc3e63c1e1961dbba7772bc65de47c33bfe732ae8a420ad95e64b777b"
SPEACHES_CTRANSLATE2 = "4.5.0"


@dataclass(frozen=True)
class Model:
    """One name of a model: its repository on the hub and the revision that this was written against."""

    repository: str
    revision: str
    # Speaches asks the hub for its list and wants the id in it; ids that only redirect are not in that list.
    listed: str = ""


# The one table of models. Revisions are those that several public projects pin.
MODELS: Mapping[str, Model] = {
    "tiny": Model("Systran/faster-whisper-tiny", "d90ca5fe260221311c53c58e660288d3deb8d356"),
    "tiny.en": Model("Systran/faster-whisper-tiny.en", "0d3d19a32d3338f10357c0889762bd8d64bbdeba"),
    "base": Model("Systran/faster-whisper-base", "ebe41f70d5b6dfa9166e2c581c45c9c0cfc57b66"),
    "base.en": Model("Systran/faster-whisper-base.en", "3d3d5dee26484f91867d81cb899cfcf72b96be6c"),
    "small": Model("Systran/faster-whisper-small", "536b0662742c02347bc0e980a01041f333bce120"),
    "small.en": Model("Systran/faster-whisper-small.en", "d1d751a5f8271d482d14ca55d9e2deeebbae577f"),
    "medium": Model("Systran/faster-whisper-medium", "08e178d48790749d25932bbc082711ddcfdfbc4f"),
    "medium.en": Model("Systran/faster-whisper-medium.en", "a29b04bd15381511a9af671baec01072039215e3"),
    "large-v1": Model("Systran/faster-whisper-large-v1", "b07c8d4be0be90092aa01a29c975077acb8d15c9"),
    "large-v2": Model("Systran/faster-whisper-large-v2", "f0fe81560cb8b68660e564f55dd99207059c092e"),
    "large-v3": Model("Systran/faster-whisper-large-v3", "edaa852ec7e145841d8ffdb056a99866b5f0a478"),
    "large-v3-turbo": Model(
        "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
        "0a363e9161cbc7ed1431c9597a8ceaf0c4f78fcf",
        listed="deepdml/faster-whisper-large-v3-turbo-ct2",
    ),
    "distil-small.en": Model(
        "Systran/faster-distil-whisper-small.en", "ef77d90526ccd62cde3808ee70626a01e5cf83e4"
    ),
    "distil-medium.en": Model(
        "Systran/faster-distil-whisper-medium.en", "80ddfce281f77766d8943d63109199fc8145dfa5"
    ),
    "distil-large-v2": Model(
        "Systran/faster-distil-whisper-large-v2", "fe9b404fc56de3f7c38606ef9ba6fd83526d05e4"
    ),
    "distil-large-v3": Model(
        "Systran/faster-distil-whisper-large-v3", "c3058b475261292e64a0412df1d2681c06260fab"
    ),
    "distil-large-v3.5": Model(
        "distil-whisper/distil-large-v3.5-ct2", "9793ccc07920e0f830e1dba0343efcdf0ef8c903"
    ),
}
# Other names that people write. As stt_server_model, whisper-1 means the default model;
# in a request it means whatever model the server was given.
ALIASES: Mapping[str, str] = {"turbo": "large-v3-turbo", "large": "large-v3", "whisper-1": DEFAULT_MODEL}

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_PREFIX = re.compile(r"^(openai/)?(faster-)?whisper-(?=.)")
_LANGUAGE = re.compile(r"^[a-z]{2,3}$")
# Those of Whisper's vocabulary.
_LANGUAGES = (
    "af am ar as az ba be bg bn bo br bs ca cs cy da de el en es et eu fa fi fo fr gl gu ha haw he "
    "hi hr ht hu hy id is it ja jw ka kk km kn ko la lb ln lo lt lv mg mi mk ml mn mr ms mt my ne "
    "nl nn no oc pa pl ps pt ro ru sa sd si sk sl sn so sq sr su sv sw ta te tg th tk tl tr tt uk "
    "ur uz vi yi yo yue zh"
)
LANGUAGES = frozenset(_LANGUAGES.split())


@dataclass(frozen=True)
class Choice:
    """What a user's model means: a repository of the hub, or a folder."""

    asked: str
    name: str
    repository: str = ""
    revision: str = ""
    listed: str = ""
    path: str = ""

    @property
    def is_folder(self) -> bool:
        return bool(self.path)


class SttError(ValueError):
    """A value that cannot work; the message is for the user."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean …?' for a near miss, else nothing."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def looks_like_path(model: str) -> bool:
    """A folder is written with a leading /, ./, ../ or ~ (else it could be an id of the hub)."""
    return model.startswith(("/", "./", "../", "~"))


def resolve_model(model: str, base: str = "") -> Choice:
    """Return what the name, id or folder of a model means. Relative folders are relative to base."""
    asked = model.strip()
    if not asked:
        raise SttError(f"No model is named. Known names: {', '.join(known_names())}.")
    if looks_like_path(asked):
        path = os.path.normpath(os.path.join(base or ".", os.path.expanduser(asked)))
        return Choice(asked=asked, name=os.path.basename(path), path=path)
    name = asked.lower()
    name = ALIASES.get(name, name)
    if name not in MODELS and _PREFIX.match(name):
        short = _PREFIX.sub("", name)
        name = ALIASES.get(short, short) if short in MODELS or short in ALIASES else name
    if name in MODELS:
        entry = MODELS[name]
        return Choice(asked, name, entry.repository, entry.revision, entry.listed or entry.repository)
    for known, entry in MODELS.items():
        if asked in (entry.repository, entry.listed):
            return Choice(
                asked,
                known,
                asked,
                entry.revision if asked == entry.repository else "",
                entry.listed or asked,
            )
    if _HUB_ID.match(asked):
        return Choice(asked, asked, asked, "", asked)
    raise SttError(
        f"'{asked}' is no model that is known here.{did_you_mean(asked, known_names())} "
        f"Known names: {', '.join(known_names())}; or an id of the hub (owner/name), or a folder "
        "(starting with /, ./ or ~) that holds a CTranslate2 model."
    )


def known_names() -> list[str]:
    """Return every name of a model that people may write."""
    return [*MODELS, *ALIASES]


def check_live_model(model: str, engine: str, base: str = "") -> None:
    """Raise SttError where a live model (nothing: none) cannot be had."""
    if not model:
        return
    resolve_model(model, base)
    if engine != "builtin":
        raise SttError(
            f"only the engine builtin has a second model for live speech, and stt_server_engine is {engine}. "
            "Set stt_server_engine: builtin, or stt_server_live_model to nothing."
        )


def check_quantization(quantization: str) -> str:
    """Return the quantization, or raise with the list."""
    if quantization in QUANTIZATIONS:
        return quantization
    raise SttError(
        f"'{quantization}' is no quantization that is known here.{did_you_mean(quantization, QUANTIZATIONS)} "
        f"Known: {', '.join(QUANTIZATIONS)}."
    )


def effective_quantization(quantization: str, device: str) -> tuple[str, str]:
    """Return the compute type for the device, and a note where it is not what was asked for."""
    if device == "cpu" and quantization == "auto":
        return "int8", ""
    if device == "cpu" and quantization in ONLY_ON_GPU:
        return "int8", f"{quantization} needs a GPU; on this CPU the model runs as int8"
    return quantization, ""


def effective_device(device: str, nodes: Iterable[str], machine: str = "x86_64") -> tuple[str, str]:
    """Return the device to run on, and a note. nodes: names under /dev that start with nvidia."""
    if device == "cpu":
        return "cpu", ""
    names = set(nodes)
    has_card = any(re.fullmatch(r"nvidia\d+", name) for name in names)
    usable = has_card and "nvidia-uvm" in names
    if usable and machine not in ("x86_64", "amd64"):
        reason = f"the speech runtime has no CUDA build for {machine}"
    elif usable:
        return "cuda", ""
    elif has_card:
        reason = (
            "there is a GPU here, but not /dev/nvidia-uvm; load nvidia-uvm on the host (nvidia-modprobe -u) "
            "and restart this instance"
        )
    else:
        reason = "there is no GPU in this instance (give the machine 'gpu: true' in infra.yml)"
    if device == "cuda":
        raise SttError(f"stt_server_device is cuda, but {reason}.")
    return "cpu", reason if has_card else ""


def problems(variables: Mapping[str, Any], base: str = "") -> list[str]:
    """Return everything that is wrong with the stt_server_* variables of a host, one message each."""
    found: list[str] = []

    def attempt(name: str, check: Any) -> None:
        try:
            check()
        except SttError as error:
            found.append(f"{name}: {error}")

    def value(name: str, default: str) -> str:
        return str(variables.get(f"stt_server_{name}", default) or "")

    if value("model", DEFAULT_MODEL) != AUTO:
        attempt("stt_server_model", lambda: resolve_model(value("model", DEFAULT_MODEL), base))
    attempt(
        "stt_server_live_model",
        lambda: check_live_model(value("live_model", ""), value("engine", "speaches"), base),
    )
    attempt("stt_server_quantization", lambda: check_quantization(value("quantization", "float16")))
    for name, known, default in (
        ("engine", ENGINES, "speaches"),
        ("engine_fallback", (*ENGINES, ""), "builtin"),
        ("device", DEVICES, "auto"),
    ):
        given = value(name, default)
        if given not in known:
            listed = ", ".join(entry or '""' for entry in known)
            found.append(f"stt_server_{name}: '{given}' is not one of {listed}.{did_you_mean(given, known)}")
    fallback = value("fallback_model", "")
    if fallback and not looks_like_path(fallback):
        found.append(
            f"stt_server_fallback_model: '{fallback}' must be a folder on the controller (starting with /)."
        )
    tts_model = value("tts_model", "")
    if tts_model and not re.fullmatch(r"[\w.-]+/[\w.-]+", tts_model):
        found.append(
            f"stt_server_tts_model: '{tts_model}' is no id on the hub (speaches-ai/Kokoro-82M-v1.0-ONNX)."
        )
    if tts_model and value("engine", "speaches") != "speaches":
        found.append(
            "stt_server_tts_model: only the engine speaches speaks; set stt_server_engine: speaches, "
            "or stt_server_tts_model to nothing."
        )
    language = value("language", "")
    if language and language not in LANGUAGES:
        hint = "" if _LANGUAGE.match(language) else " Write the two letters, such as en, de or fr."
        found.append(f"stt_server_language: '{language}' is no language code that Whisper knows.{hint}")
    port = str(variables.get("stt_server_port", 8000))
    if not port.isdigit() or not 0 < int(port) < 65536:
        found.append(f"stt_server_port: '{port}' is no port (1 to 65535).")
    return found


def local_id(name: str, digest: str) -> str:
    """Return the id under which Speaches finds a folder: the digest makes it one the hub cannot have."""
    return f"local/{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-.') or 'model'}-{digest[:12]}"


def hub_folder(identifier: str) -> str:
    """Return the folder name that the hub's cache gives a model."""
    return "models--" + identifier.replace("/", "--")


def speaches_aliases(model_id: str, asked: str) -> dict[str, str]:
    """Return model_aliases.json: names in requests to the ids that Speaches knows."""
    aliases = {name: entry.listed or entry.repository for name, entry in MODELS.items()}
    aliases |= {name: aliases[target] for name, target in ALIASES.items()}
    aliases |= {entry.repository: entry.listed for entry in MODELS.values() if entry.listed}
    aliases |= {"whisper-1": model_id, asked: model_id}
    return {name: target for name, target in sorted(aliases.items()) if name != target}


def stamp(*parts: Any) -> str:
    """Return one digest over what an installation was made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
