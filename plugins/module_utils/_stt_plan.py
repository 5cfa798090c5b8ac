# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role stt_server will do on a machine: from what was asked and what is there, without I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_capability, _stt
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_plan import TURNS

ROOTS = {"builtin": "/opt/voicegate", "speaches": "/opt/speaches"}
STATES = {"builtin": "/var/lib/voicegate", "speaches": "/var/lib/speaches"}
CUDA_ENVIRONMENT = "/opt/stt-cuda"
READY = "/usr/bin/python3 -I /opt/stt-ready.py --process=${MAINPID}"
CUDA_PARTS = ("cublas", "cudnn", "cuda_nvrtc")
SPEACHES_PYTHON = "3.12"
# What Speaches needs to tell speakers apart, and the file of each that matters.
DIARIZATION_MODELS: Mapping[str, str] = {
    "fedirz/segmentation_community_1": "model.onnx",
    "Wespeaker/wespeaker-voxceleb-resnet34-LM": "voxceleb_resnet34_LM.onnx",
}
# Settings of voicegate: the role's where the engine is in it. In front of another engine they name one of
# that one's models.
LIVE_SETTINGS = ("live_model", "live_revision")
BUILTIN_START = "{}/venv/bin/python -m voicegate serve"


@dataclass(frozen=True)
class Facts:
    """What a machine says about itself; the callables look only when the answer matters."""

    nodes: Sequence[str]
    machine: str
    python: str  # version of the system's Python, such as 3.11
    python_path: str
    digest_at: Callable[[str], str]  # digest recorded for what was put at a path
    stamp_at: Callable[[str], str]  # stamp of a finished installation
    model_at: Callable[[str], bool]  # does a folder hold a model
    cached: Callable[[str, str, str], bool]  # hub cache, id, revision
    unreachable: Callable[[str], str]  # reason why an address does not answer, or nothing
    has_python: Callable[[str], bool]
    running: Sequence[str] = ()  # units of ours that are enabled or running
    cards: Callable[[], Sequence[Mapping[str, Any]]] = tuple  # what the driver says of the cards here
    in_cache: Callable[[str, str, str], bool] = lambda *_unused: False  # hub cache, id, file
    hub_status: Callable[[str], int] = lambda _unused: 0  # HTTP status, with the token; 0: no answer


def hub_cache(engine: str) -> str:
    return f"{STATES[engine]}/hf/hub"


def _model(request: Mapping[str, Any], engine: str, facts: Facts, which: str = "model") -> dict[str, Any]:
    """Return where `model` or `live_model` comes from and where it will be; the latter may be skipped."""
    choice, digest = request[which], request[f"{which}_digest"]
    if choice["path"] and not digest:
        if not facts.model_at(choice["path"]):
            raise _stt.SttError(
                f"stt_server_{which}: there is no folder with a model.bin at {choice['path']}, "
                "neither on the controller nor on this machine."
            )
        if engine == "speaches":
            raise _stt.SttError(
                "stt_server_model: Speaches reads models from its own cache; "
                f"keep {choice['path']} on the controller (it is copied), or set stt_server_engine: builtin."
            )
        return {"name": choice["name"], "id": choice["name"], "argument": choice["path"]}
    if choice["path"]:
        return _folder(choice["name"], choice["path"], digest, engine)
    identifier = choice["listed"] if engine == "speaches" else choice["repository"]
    revision = choice["revision"] if engine == "builtin" else ""
    found = {
        "name": choice["name"],
        "id": identifier,
        "argument": identifier,
        "revision": revision,
        "fetch": not facts.cached(hub_cache(engine), identifier, revision),
    }
    reason = facts.unreachable(request["hub_url"]) if found["fetch"] else ""
    if not reason:
        return found
    reason = f"the model hub cannot be reached ({reason})"
    if engine == "speaches":
        raise Unreachable(reason)
    if which == "live_model":
        return {
            "skipped": {
                "what": f"live model {choice['name']}",
                "why": f"{reason}; live speech uses the main model",
            },
        }
    if not request["fallback_digest"]:
        raise _stt.SttError(
            f"The model {choice['name']} is not on this machine and {reason}. Connect the machine, or set "
            "stt_server_model or stt_server_fallback_model to a folder on the controller that holds a model."
        )
    path = request["fallback_path"]
    return {
        **_folder(path.rstrip("/").rsplit("/", 1)[-1], path, request["fallback_digest"], engine),
        "skipped": {"what": f"model {choice['name']}", "why": f"{reason}; {path} is used instead"},
    }


def _folder(name: str, path: str, digest: str, engine: str) -> dict[str, Any]:
    if engine == "speaches":
        identifier = _stt.local_id(name, digest)
        dest = f"{hub_cache(engine)}/{_stt.hub_folder(identifier)}"
        return {
            "name": name,
            "id": identifier,
            "argument": identifier,
            "src": path,
            "dest": dest,
            "digest": digest,
        }
    # The folder's own name stays the last part: it is what /v1/models lists.
    dest = f"{ROOTS[engine]}/models/{digest[:12]}/{name}"
    return {"name": name, "id": name, "argument": dest, "src": path, "dest": dest, "digest": digest}


def _live_model(
    request: Mapping[str, Any], engine: str, facts: Facts, main: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Return the small model for live speech, nothing if there is none, and a note."""
    if not request.get("live_model") or engine != "builtin":
        return {}, ""
    live = _model(request, engine, facts, "live_model")
    if live.get("argument") != main["argument"]:
        return live, ""
    return {}, f"stt_server_live_model: {main['name']} is the main model too; it is loaded once"


class Unreachable(Exception):
    """A source of Speaches that does not answer: the other engine may be used."""


def make_plan(request: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """Return what to do; SttError when it cannot be done."""
    notes: list[str] = []
    skipped: list[dict[str, str]] = []
    device, note = _stt.effective_device(request["device"], facts.nodes, facts.machine)
    notes += [note] if note else []
    cards: Sequence[Mapping[str, Any]] = ()
    if device == "cuda":
        # What apply found on the server, else what the driver tells here.
        cards = request.get("cards") or facts.cards() or [{}]
        device, note = _usable(request["device"], cards)
        notes += [note] if note else []

    plan: dict[str, Any] = {"device": device, "asked": request["engine"]}
    engine = request["engine"]
    try:
        plan |= _engine(request, engine, device, facts, cards)
    except Unreachable as error:
        fallback = request["engine_fallback"]
        if fallback in ("", engine):
            raise _stt.SttError(
                f"{engine}: {error}. Give stt_server_speaches_source (folder or archive on the controller), "
                "or set stt_server_engine: builtin, or allow it with stt_server_engine_fallback: builtin."
                + (" Only speaches has stt_server_tts_model." if request.get("tts_model") else "")
            ) from error
        skipped.append({"what": engine, "why": f"{error}; the engine {fallback} is used instead"})
        engine = fallback
        try:
            plan |= _engine(request, engine, device, facts, cards)
        except Unreachable as second:
            raise _stt.SttError(f"{engine}: {second}.") from second
    for model in (plan["model"], plan["live_model"]):
        if "skipped" in model:
            skipped.append(model.pop("skipped"))
    plan["notes"] = notes + plan["notes"]
    plan["skipped"] = skipped
    wanted = {plan["unit"]} if request["enabled"] else set()
    if request.get("gateway"):
        plan["gateway"] = _gateway(request, plan, facts)
        wanted |= {plan["gateway"]["unit"]} if request["enabled"] else set()
        if request["gateway"].get("diarization") and request["enabled"]:
            reason = _no_diarization(request, plan, facts)
            if reason:
                skipped.append({"what": "telling speakers apart", "why": reason})
            else:
                plan["gateway"]["environment"]["VOICEGATE_DIARIZATION"] = "upstream"
                plan["gateway"]["diarization_models"] = list(DIARIZATION_MODELS)
    plan["stop"] = [
        unit for unit in sorted(_stt.UNITS.values()) if unit in facts.running and unit not in wanted
    ]
    # The gateway computes itself where voicegate is the engine: then it is one unit, and that role's.
    plan["run"] = request["enabled"] and plan["unit"] != plan.get("gateway", {}).get("unit")
    return plan


def _gateway(request: Mapping[str, Any], plan: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """Return the unit of role voice_gateway: voicegate in front of the engine, or with the engine in it."""
    settings = request["gateway"]
    environment = {f"VOICEGATE_{name.upper()}": str(value) for name, value in settings["settings"].items()}
    # The unit's state folder is its user's; jobs survive a new version in it.
    environment["VOICEGATE_DATA_DIR"] = f"{STATES['builtin']}/jobs"
    if settings["wyoming_port"]:
        environment["VOICEGATE_WYOMING_PORT"] = str(settings["wyoming_port"])
    if plan["engine"] == "builtin":
        for name in LIVE_SETTINGS:  # after a fallback from the engine that they were written for
            if environment.pop(f"VOICEGATE_{name.upper()}", ""):
                plan["notes"].append(
                    f"voice_gateway_settings: {name} is not for the engine builtin; left out"
                )
        own = {name: plan[name] for name in ("release", "stamp", "install", "cuda", "exec_start", "url")}
        return {
            **own,
            "gpu": plan["device"] == "cuda",
            "unit": plan["unit"],
            "environment": {**plan["environment"], **environment},
        }
    release = _builtin_release(request, facts)
    stamp = _stt.stamp("builtin", release["digest"], "", release["python"])
    host, port = str(request["host"]), str(request["port"])
    turns = _turns(request, plan["engine"], plan["device"])
    environment = {
        "HF_HUB_OFFLINE": "1",
        "SOTTOVOCE_BUILD": stamp,
        "PYTHONPATH": f"{release['path']}/src",
        "VOICEGATE_HOST": host,
        "VOICEGATE_PORT": port,
        "VOICEGATE_MODEL": plan["model"]["id"],
        "VOICEGATE_UPSTREAM": plan["url"],
        "VOICEGATE_UPSTREAM_MODEL": plan["model"]["id"],
        **({"VOICEGATE_LANGUAGE": request["language"]} if request["language"] else {}),
        **({"VOICEGATE_TTL": str(request["ttl"]), **turns} if turns else {}),
        **environment,
    }
    return {
        "release": release,
        "stamp": stamp,
        "install": facts.stamp_at(release["path"]) != stamp,
        "cuda": False,
        "gpu": bool(turns),  # to read how much of the card is free
        "unit": _stt.UNITS["builtin"],
        "environment": environment,
        "exec_start": BUILTIN_START.format(release["path"]),
        "url": f"http://{_local(host)}:{port}",
    }


def _turns(request: Mapping[str, Any], engine: str, device: str) -> dict[str, str]:
    """Return what voicegate is told of who may be on the card; empty where it does not decide that."""
    turns = request.get("turns") or {}
    if device != "cuda":
        return {}
    if engine == "builtin":
        leave = "vram_kept_mib"  # its process ends
    elif request.get("gateway") and turns.get("vram_policy") in TURNS:
        leave = "vram_fallback"  # Speaches computes as it was started
    else:
        return {}
    return {
        f"VOICEGATE_{name.upper()}": str(value) for name, value in turns.items() if value and name != leave
    }


def _no_diarization(request: Mapping[str, Any], plan: Mapping[str, Any], facts: Facts) -> str:
    """Return why Speaches cannot tell speakers apart now, or nothing; SttError where you can help."""
    if plan["engine"] != "speaches":
        return f"the engine {plan['engine']} cannot"
    hub = request["hub_url"].rstrip("/")
    for model, file in DIARIZATION_MODELS.items():
        if facts.in_cache(hub_cache("speaches"), model, file):
            continue
        reason = facts.unreachable(request["hub_url"])
        status = 0 if reason else facts.hub_status(f"{hub}/{model}/resolve/main/{file}")
        if status in (401, 403):
            token = "does not open it" if request["gateway"].get("has_hf_token") else "is not set"
            raise _stt.SttError(
                f"voice_gateway_diarization: {model} is gated, or gone (HTTP {status}), and "
                f"voice_gateway_hf_token {token}. Accept its conditions at {hub}/{model}, make a token that "
                f"may read at {hub}/settings/tokens, and set voice_gateway_hf_token to it."
            )
        if status == 404:
            raise _stt.SttError(
                f"voice_gateway_diarization: {hub} has no {model}, which Speaches needs for it."
            )
        if not 200 <= status < 400:
            reason = reason or (f"HTTP {status}" if status else "no answer")
            return f"{model} is not on this machine and the model hub cannot be reached ({reason})"
    return ""


def _usable(asked: str, cards: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the device for cards that are there, and a note: old ones may have no code in CTranslate2."""
    for card in cards:
        capability = str(card.get("capability") or "")
        if _gpu_capability.known(capability) and not _gpu_capability.compute_types(capability):
            reason = f"CTranslate2 has no code for {_gpu_capability.describe(card)}"
            if asked == "cuda":
                raise _stt.SttError(f"stt_server_device is cuda, but {reason}. Set stt_server_device: cpu.")
            return "cpu", f"{reason}; the model runs on the CPU"
    return "cuda", ""


def _compute_type(
    request: Mapping[str, Any], engine: str, device: str, cards: Sequence[Mapping[str, Any]]
) -> tuple[str, list[str]]:
    """Return the compute type of an engine, and notes; SttError where the card cannot do what is asked."""
    if device == "cpu":
        quantization, note = _stt.effective_quantization(request["quantization"], device)
        return quantization, [note] if note else []
    versions = request.get("ctranslate2") or {}
    quantization, notes, refusals = _gpu_capability.settle(
        {
            "quantization": request["quantization"],
            "engine": engine,
            "ctranslate2": versions.get(engine, ""),
        },
        cards,
    )
    if refusals:
        raise _stt.SttError("\n".join(refusals))
    return quantization, notes


def _engine(
    request: Mapping[str, Any],
    engine: str,
    device: str,
    facts: Facts,
    cards: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    if engine == "speaches" and request.get("gateway"):
        # Its address is the gateway's now.
        request = {**request, "host": "127.0.0.1", "port": request["gateway"]["engine_port"]}
    release = _speaches_release(request, facts) if engine == "speaches" else _builtin_release(request, facts)
    # After the release: a source that does not answer may lead to another engine.
    quantization, notes = _compute_type(request, engine, device, cards)
    model = _model(request, engine, facts)
    live, note = _live_model(request, engine, facts, model)
    notes += [note] if note else []
    stamp = _stt.stamp(
        engine, release["digest"], request["cuda_lock"] if device == "cuda" else "", release["python"]
    )
    installed = facts.stamp_at(release["path"]) == stamp

    def missing(model: Mapping[str, Any]) -> bool:
        copied = not model.get("dest") or facts.digest_at(model["dest"]) == model["digest"]
        return not copied or bool(model.get("fetch"))

    return {
        "engine": engine,
        "unit": _stt.UNITS[engine],
        "version": release["version"],
        "release": release,
        "model": model,
        "live_model": live,
        "compute_type": quantization,
        "notes": notes,
        "stamp": stamp,
        "install": not installed,
        "provide": [found for found in (model, live) if missing(found)],
        "cuda": device == "cuda",
        "system_python": facts.python_path,
        "state": STATES[engine],
        **service(request, engine, release, model, live, device, quantization, stamp, facts.python),
    }


def _builtin_release(request: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    digest = request["gateway_digest"]
    # Targets have at least 3.11 (Debian 12).
    return {
        "path": f"{ROOTS['builtin']}/releases/{digest[:12]}",
        "digest": digest,
        "src": request["gateway_path"],
        "version": request["gateway_version"],
        "python": facts.python_path,
    }


def _speaches_release(request: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    version = request["speaches_version"]
    pinned = request["speaches_digest"]
    digest = request["speaches_source_digest"] or pinned
    path = f"{ROOTS['speaches']}/releases/{version}" + ("" if digest == pinned else f"-{digest[:8]}")
    release = {
        "path": path,
        "digest": digest,
        "src": request["speaches_source"],
        "url": "" if request["speaches_source"] else request["speaches_url"],
        "version": version,
        "python": request["python"] or SPEACHES_PYTHON,
    }
    if facts.digest_at(path) != digest and release["url"]:
        reason = facts.unreachable(release["url"])
        if reason:
            raise Unreachable(f"its source cannot be reached ({reason})")
    if not facts.stamp_at(path) and not facts.has_python(release["python"]):
        reason = facts.unreachable(request["python_url"])
        if request["python"]:
            raise _stt.SttError(f"stt_server_python: there is no interpreter at {request['python']}.")
        if reason:
            raise Unreachable(
                f"it needs Python {SPEACHES_PYTHON}, which is not here and cannot be fetched ({reason})"
            )
    return release


def _local(host: str) -> str:
    """Where a server that listens on `host` is reached from its own machine."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104


def service(
    request: Mapping[str, Any],
    engine: str,
    release: Mapping[str, Any],
    model: Mapping[str, Any],
    live: Mapping[str, Any],
    device: str,
    quantization: str,
    stamp: str,
    python: str,
) -> dict[str, Any]:
    """Return command line, environment and URLs of the unit."""
    home = f"{STATES[engine]}/hf"
    environment: dict[str, str] = {
        "HF_HOME": home,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        # What is installed: a change of it restarts the unit.
        "SOTTOVOCE_BUILD": stamp,
    }
    if request["hub_endpoint"]:
        environment["HF_ENDPOINT"] = request["hub_endpoint"]
    if device == "cuda":
        site = f"{CUDA_ENVIRONMENT}/lib/python{python}/site-packages/nvidia"
        environment["LD_LIBRARY_PATH"] = ":".join(f"{site}/{part}/lib" for part in CUDA_PARTS)
    host, port = str(request["host"]), str(request["port"])
    ttl = str(request["ttl"])
    # Where the gateway sees to it who is on the card, Speaches neither loads nor lets go by itself.
    led = engine == "speaches" and bool(_turns(request, engine, device))
    if engine == "builtin":
        environment |= {
            "PYTHONPATH": f"{release['path']}/src",
            "VOICEGATE_HOST": host,
            "VOICEGATE_PORT": port,
            "VOICEGATE_MODEL": model["argument"],
            "VOICEGATE_DEVICE": device,
            "VOICEGATE_COMPUTE_TYPE": quantization,
            "VOICEGATE_TTL": ttl,
            # The model was provided before the start; the hub is not asked again.
            "HF_HUB_OFFLINE": "1",
        }
        environment |= {"VOICEGATE_LANGUAGE": request["language"]} if request["language"] else {}
        environment |= _turns(request, engine, device)
        environment |= {"VOICEGATE_REVISION": model["revision"]} if model.get("revision") else {}
        environment |= {"VOICEGATE_LIVE_MODEL": live["argument"]} if live.get("argument") else {}
        environment |= {"VOICEGATE_LIVE_REVISION": live["revision"]} if live.get("revision") else {}
        exec_start = BUILTIN_START.format(release["path"])
        working_directory = ""
    else:
        environment |= {
            "PYTHONPATH": f"{release['path']}/src",
            "UVICORN_HOST": host,
            "UVICORN_PORT": port,
            "STT_MODEL_TTL": "-1" if led else ttl,
            "VAD_MODEL_TTL": "-1",
            "WHISPER__INFERENCE_DEVICE": device,
            "WHISPER__COMPUTE_TYPE": quantization,
            # Voice activity detection is small: it must not take VRAM from the models.
            "UNSTABLE_ORT_OPTS__EXCLUDE_PROVIDERS": json.dumps(
                ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
            ),
            "ENABLE_UI": "false",
            "LOG_LEVEL": "info",
            "GRADIO_ANALYTICS_ENABLED": "False",
            # Loading asks the hub for news; without a network that must not hold a request up.
            "HF_HUB_ETAG_TIMEOUT": "3",
        }
        exec_start = f"{release['path']}/.venv/bin/uvicorn --factory speaches.main:create_app"
        # It reads model_aliases.json and its console from there.
        working_directory = release["path"]
    local = _local(host)
    aliases = _stt.speaches_aliases(model["id"], request["model"]["asked"]) if engine == "speaches" else {}
    return {
        "environment": environment | ({"SOTTOVOCE_ALIASES": _stt.stamp(aliases)} if aliases else {}),
        "exec_start": exec_start,
        "working_directory": working_directory,
        # Ends when the model is loaded, where it is to stay. voicegate loads it by itself.
        "ready": " ".join(
            [
                READY,
                *(["--load", model["id"]] if engine == "speaches" and not led else []),
                f"http://{local}:{port}",
            ]
        ),
        "model_state": "present" if led else "loaded",
        "url": f"http://{local}:{port}",
        # What the status table shows. Speaches wants the key for it, which no unit file may hold.
        "details_url": f"http://{local}:{port}/health"
        if engine == "builtin"
        else ("" if request["has_key"] else f"http://{local}:{port}/api/ps"),
        "aliases": aliases,
    }


def summarize(
    plan: Mapping[str, Any], enabled: bool, address: str, health: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the summary says: what the running engine tells of itself, else what was planned."""
    told = health.get("json") if isinstance(health.get("json"), Mapping) else {}
    told = told if plan["engine"] == "builtin" and told else {}
    notes = list(plan["notes"])
    quantization = str(told.get("compute_type") or plan["compute_type"])
    device = str(told.get("device") or plan["device"])
    if told and quantization != plan["compute_type"]:
        notes.append(f"{plan['compute_type']} was asked of the engine, which computes as {quantization}")
    if told and device != plan["device"]:
        notes.append(f"{plan['device']} was asked of the engine, which runs on {device}")
    url = plan.get("gateway", plan)["url"]
    if address:
        url = url.replace("//127.0.0.1:", f"//{address}:")
    summary = {
        "url": f"{url}/v1",
        "engine": plan["engine"],
        "version": plan["version"],
        "model": str(told.get("model") or plan["model"]["name"]),
        "quantization": quantization,
        "device": device,
        "skipped": list(plan["skipped"]),
        "notes": notes,
    }
    if not enabled:
        summary |= {"url": "", "notes": ["disabled by stt_server_enabled: false"], "skipped": []}
    return summary
