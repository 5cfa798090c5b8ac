# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the variables of a machine to a plan for its card, and the plan as plain data and text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_capability, _stt
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_plan as vram
from ansible_collections.sottovoce.stack.plugins.module_utils._gguf import GgufError, read_metadata
from ansible_collections.sottovoce.stack.plugins.module_utils._ollama import wanted_models
from ansible_collections.sottovoce.stack.plugins.module_utils._summary import table
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_footprint import (
    WHISPER,
    Footprint,
    Llm,
    UnknownModel,
    llm_from_metadata,
)

# The roles' defaults of what is read here; a test holds them equal.
STT_DEFAULTS: Mapping[str, Any] = {
    "stt_server_engine": "speaches",
    "stt_server_engine_fallback": "builtin",
    "stt_server_model": "large-v3-turbo",
    "stt_server_live_model": "",
    "stt_server_quantization": "float16",
    "stt_server_device": "auto",
    "stt_server_enabled": True,
}
OLLAMA_DEFAULTS: Mapping[str, Any] = {
    "ollama_server_default_model": "",
    "ollama_server_extra_models": ["nomic-embed-text"],
    "ollama_server_context_length": 8192,
    "ollama_server_num_parallel": 1,
    "ollama_server_kv_cache_type": "f16",
    "ollama_server_max_loaded_models": 2,
    "ollama_server_service_enabled": True,
}
GIVE_SIZE = "gpu_vram_mib: 12288 (MiB, as nvidia-smi shows them) or gpu_card: RTX 3060"
# What a person sets for a field of a mix.
_SETS: Mapping[str, str] = {
    "model": "stt_server_model",
    "compute_type": "stt_server_quantization",
    "live": "stt_server_live_model",
    "context": "ollama_context_length",
    "kv_type": "ollama_kv_cache_type",
    "loaded": "ollama_max_loaded_models",
    "parallel": "ollama_num_parallel",
    "policy": "vram_policy",
    "llms": "ollama_default_model",
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A mix, and what could not be counted; `card` is 0 if nobody said how large it is."""

    mix: Optional[vram.Mix]
    card: int
    unknown: tuple[str, ...] = ()


def _true(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "yes", "on", "1")


def card_of(variables: Mapping[str, Any]) -> int:
    """MiB of the machine's card by its variables; 0 if none says it. Raises PlanError."""
    if variables.get("gpu_vram_mib"):
        try:
            mib = int(variables["gpu_vram_mib"])
        except (TypeError, ValueError):
            mib = 0
        if mib < 512:
            raise vram.PlanError(
                f"gpu_vram_mib: {variables['gpu_vram_mib']!r} is no size of a card in MiB. Write {GIVE_SIZE}."
            )
        return mib
    return vram.card_mib(str(variables["gpu_card"])) if variables.get("gpu_card") else 0


def ask(variables: Mapping[str, Any], capabilities: Iterable[str] = ()) -> Asked:
    """
    What a machine's variables ask of its card: what `stt_server` and `ollama_server` are told, in the roles'
    own names. `capabilities` are those of its cards, as far as they are known. Raises PlanError, with the
    variable's name, for what makes no sense.
    """
    roles = variables.get("instance_roles") or []
    unknown: list[str] = []
    fields: dict[str, Any] = {"policy": str(variables.get("vram_policy") or "resident")}
    stt = {key: variables.get(key, default) for key, default in STT_DEFAULTS.items()}
    if "stt_server" in roles and _true(stt["stt_server_enabled"]) and stt["stt_server_device"] != "cpu":
        fields.update(
            engine=str(stt["stt_server_engine"]),
            compute_type=str(stt["stt_server_quantization"]),
        )
        fields["allowed"] = _allowed(fields["engine"], capabilities)
        fields["model"], fields["live"] = _speech_names(
            str(stt["stt_server_model"]),
            str(stt["stt_server_live_model"] or ""),
            fields["engine"],
            unknown,
        )
    # `ollama_x` is the same as `ollama_server_x`, and wins.
    ollama = {
        key: variables.get(key.replace("_server_", "_"), variables.get(key, default))
        for key, default in OLLAMA_DEFAULTS.items()
    }
    if "ollama_server" in roles and _true(ollama["ollama_server_service_enabled"]):
        try:
            fields.update(
                context=int(ollama["ollama_server_context_length"]),
                parallel=int(ollama["ollama_server_num_parallel"]),
                loaded=int(ollama["ollama_server_max_loaded_models"]),
            )
        except (TypeError, ValueError) as error:
            raise vram.PlanError(
                f"ollama_context_length, ollama_num_parallel, ollama_max_loaded_models: {error}"
            ) from error
        fields["kv_type"] = str(ollama["ollama_server_kv_cache_type"])
        fields["llms"] = _language(
            ollama["ollama_server_default_model"], ollama["ollama_server_extra_models"], unknown
        )
    card = card_of(variables)
    mix = vram.Mix(card_mib=card, **fields) if card else None
    return Asked(mix, card, tuple(unknown))


def _speech_names(model: str, live: str, engine: str, unknown: list[str]) -> tuple[str, str]:
    """
    The names of both speech models in the planner's table. They share a process: where one of them is not
    known, neither is counted.
    """
    try:
        _stt.check_live_model(live, engine)
    except _stt.SttError as error:
        raise vram.PlanError(f"stt_server_live_model: {error}") from error
    main = speech_name(model, unknown)
    small = speech_name(live, unknown, "live_model") if live else ""
    if live and bool(main) != bool(small):
        unknown.append(f"{f'speech model {model}' if main else f'live model {live}'} beside it")
        return "", ""
    return main, small


def speech_name(model: str, unknown: list[str], which: str = "model") -> str:
    """
    The name in the planner's table; nothing (and why) for a folder or a model of somebody else. `which` is
    the variable of stt_server: model or live_model.
    """
    if model == vram.AUTO and which == "model":
        return model
    try:
        name = _stt.resolve_model(model).name
    except _stt.SttError as error:
        raise vram.PlanError(f"stt_server_{which}: {error}") from error
    if name in WHISPER:
        return name
    unknown.append(f"{'live' if which == 'live_model' else 'speech'} model {model}")
    return ""


def _language(default: Any, extra: Any, unknown: list[str]) -> tuple[Llm, ...]:
    try:
        wanted = wanted_models(str(default or ""), extra or [])
    except ValueError as error:
        raise vram.PlanError(f"ollama_default_model, ollama_extra_models: {error}") from error
    found = []
    for name in wanted["pull"]:
        try:
            found.append(vram.known_llm(name))
        except UnknownModel:
            unknown.append(f"language model {name}")
    for entry in wanted["create"]:
        try:
            found.append(llm_of_file(entry["name"], entry["gguf"]))
        except (UnknownModel, GgufError, OSError):
            unknown.append(f"language model {entry['name']}")
    return tuple(found)


def llm_of_file(name: str, path: str) -> Llm:
    """A model from its GGUF file. Raises GgufError, UnknownModel, OSError."""
    import os

    return llm_from_metadata(name, read_metadata(path), os.path.getsize(path))


def _allowed(engine: str, capabilities: Iterable[str]) -> tuple[str, ...]:
    """The compute types that all of the cards can do with the engine's CTranslate2; empty if nobody knows."""
    version = _stt.SPEACHES_CTRANSLATE2 if engine == "speaches" else ""
    each = [_gpu_capability.compute_types(capability, version) for capability in capabilities]
    return tuple(name for name in each[0] if all(name in types for types in each)) if each else ()


def plan(variables: Mapping[str, Any], capabilities: Iterable[str] = ()) -> dict[str, Any]:
    """
    The plan of one machine as plain data (sizes in MiB): `status` is fits, refused, or unknown (no size of
    the card, or a model without figures), with `lines` for people. Raises PlanError, and UnknownModel.
    """
    asked = ask(variables, capabilities)
    result: dict[str, Any] = {
        "status": "unknown",
        "card_mib": asked.card,
        "verdict": "",
        "parts": [],
        "units": {},
        "settings": {},
        "nearest": [],
        "unknown": list(asked.unknown),
        "lines": [],
    }
    policy = str(variables.get("vram_policy") or "resident")
    if asked.mix is None and policy in vram.TURNS:
        raise vram.PlanError(
            f"vram_policy: {policy!r} needs to know how large the card is. Write {GIVE_SIZE}."
        )
    if asked.mix is None:
        result["lines"] = [f"VRAM is not planned: nobody says how large the card is. Write {GIVE_SIZE}."]
        return result
    mix = asked.mix
    roles = variables.get("instance_roles") or []
    seen = mix.engine == "builtin" or "voice_gateway" in roles
    if policy in vram.TURNS and "stt_server" in roles:
        _check_turns(mix, asked, seen)
    found = vram.choose(asked.mix)
    refused = not found.ok and not asked.unknown
    result.update(
        status="unknown" if asked.unknown else ("refused" if refused else "fits"),
        verdict=found.verdict,
        driver_mib=vram.DRIVER_MIB,
        need_mib=found.need_mib,
        parts=[as_part(part) for part in found.parts],
        units=units_of(found, str(variables.get("stt_server_engine_fallback", "builtin"))),
        settings={
            "stt_server_model": found.mix.model,
            "stt_server_quantization": found.mix.compute_type if found.mix.model else "",
            "fit_target_mib": found.fit_target_mib if found.mix.llms else 0,
            "context_length": found.mix.context,
            "num_parallel": found.mix.parallel,
            "max_loaded_models": found.mix.loaded,
            "vram_policy": found.mix.policy,
            "speech_need_mib": found.speech.peak if found.speech else 0,
            "speech_int8_mib": _int8_mib(found),
            "speech_kept_mib": found.speech.unloaded if found.speech and mix.engine != "builtin" else 0,
        },
    )
    if refused:
        near = vram.nearest(found.mix, turns=seen)
        result["nearest"] = [{"change": in_words(told), "need_mib": tried.need_mib} for tried, told in near]
    result["lines"] = report(result)
    return result


def _check_turns(mix: vram.Mix, asked: Asked, seen: bool) -> None:
    """Raises PlanError where nobody can carry out that speech and language take turns.

    `seen`: voicegate is the engine or stands in front of it, so that it sees every request beforehand.
    """
    if mix.model and not seen:
        raise vram.PlanError(
            f"vram_policy: {mix.policy!r} is carried out by voicegate: Speaches by itself does not look at"
            " the card before it loads its model. Add voice_gateway to the machine's roles, after stt_server;"
            " or write stt_server_engine: builtin, or vram_policy: resident and a mix that fits together."
        )
    if not mix.model and asked.unknown:
        raise vram.PlanError(
            f"vram_policy: {mix.policy!r} needs a speech model of known size, and that of"
            f" {', '.join(asked.unknown)} is not known. Name one of {', '.join(_stt.MODELS)}."
        )


def as_part(part: Footprint) -> dict[str, Any]:
    return {
        "name": part.name,
        "rest_mib": part.rest,
        "peak_mib": part.peak,
        "error_mib": part.error,
        "parts": dict(part.parts),
        "source": part.source,
    }


def _int8_mib(found: vram.Fit) -> int:
    """What speech takes at its peak in int8, where that is less than in what was chosen; else 0."""
    if found.speech is None:
        return 0
    part = vram.speech(found.mix, compute_type="int8")
    return part.peak if part.peak < found.speech.peak else 0


def units_of(found: vram.Fit, fallback: str = "") -> dict[str, dict[str, int]]:
    """
    What each systemd unit takes, MiB at rest and at peak. Of speech-to-text also that of the engine that
    a machine may fall back to: which of them runs is decided there.
    """
    units = {}
    if found.speech:
        mix = found.mix
        for engine in dict.fromkeys([mix.engine, *([fallback] if fallback in _stt.UNITS else [])]):
            part = vram.speech(mix, engine=engine)
            units[_stt.UNITS[engine]] = {"rest_mib": part.rest, "peak_mib": part.peak}
    if found.llms:
        units["ollama"] = {
            "rest_mib": sum(part.rest for part in found.llms),
            "peak_mib": sum(part.peak for part in found.llms),
        }
    return units


def in_words(changes: Mapping[str, Any]) -> str:
    """The variables to set, as one writes them."""
    told = []
    for field, value in sorted(changes.items(), key=lambda item: list(_SETS).index(item[0])):
        if field == "llms":
            value = max(value, key=lambda model: model.weights_mib).name
        told.append(f"{_SETS[field]}: {value}" if value != "" else f'{_SETS[field]}: ""')
    return ", ".join(told)


def report(result: Mapping[str, Any]) -> list[str]:
    """Table, sum and verdict; what would fit; what was not counted."""
    rows = [["driver", str(result["driver_mib"]), str(result["driver_mib"]), ""]]
    rows += [
        [part["name"], str(part["rest_mib"]), str(part["peak_mib"]), f"±{part['error_mib']}"]
        for part in result["parts"]
    ]
    rows.append(["needed with room to spare", "", str(result["need_mib"]), ""])
    rows.append(["card", "", str(result["card_mib"]), ""])
    lines = table(["MiB", "AT REST", "AT PEAK", "ERROR"], rows)
    settings = result["settings"]
    if result["unknown"]:
        lines.append(f"Not counted, because their size is not known: {', '.join(result['unknown'])}.")
    if result["status"] == "refused":
        stays = "" if settings["vram_policy"] in vram.TURNS else ", and both are to stay loaded"
        lines.append(f"This mix does not fit: it {result['verdict']}{stays}.")
        lines += [f"Would fit ({near['need_mib']} MiB): {near['change']}" for near in result["nearest"]]
        if not result["nearest"]:
            lines.append("Nothing smaller that is known here would fit: a larger card, or one of the two.")
    else:
        lines.append(f"This mix {result['verdict']}." if not result["unknown"] else "")
    if settings.get("fit_target_mib") and result["status"] != "refused":
        lines.append(
            f"Ollama leaves {settings['fit_target_mib']} MiB free; context {settings['context_length']},"
            f" {settings['num_parallel']} request(s) at once,"
            f" {settings['max_loaded_models']} model(s) loaded."
        )
    return [line for line in lines if line]
