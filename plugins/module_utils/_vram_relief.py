# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a card is nearly full: which idle model of Ollama may go. MiB, and seconds since 1970.

Ollama's /api/ps does not tell whether a model is at work: `expires_at` is set when a request ends, and stays
as it was while the next one runs (server/sched.go of 0.34). So a request in flight is looked for where it
cannot hide: as an established connection to Ollama's port. Whoever merely keeps one open protects the models
as well; that errs on the safe side. Should a request come in between, Ollama finishes it before it unloads.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Optional

LOW_FREE = "low-free"
# `keep_alive: -1` gives an expiry centuries ahead.
FOR_EVER = 365 * 86400.0
_FRACTION = re.compile(r"\.(\d{1,6})\d*")
_ESTABLISHED = "01"


class ReliefError(Exception):
    """Ollama did not unload; the message says why."""


@dataclass(frozen=True)
class Rules:
    """Under how much free VRAM (MiB) to act, after how many readings in a row, and which models stay."""

    reserve_mib: int
    keep: Sequence[str] = ()
    readings: int = 2


@dataclass(frozen=True)
class Loaded:
    """A model that Ollama has in VRAM; expires is 0 if Ollama does not say."""

    name: str
    vram_mib: int
    expires: float


@dataclass(frozen=True)
class Step:
    """Readings under the reserve in a row, the model to unload (or none), and what the log says of it."""

    low: int = 0
    model: str = ""
    why: str = ""


@dataclass
class State:
    """What is kept from one reading to the next."""

    low: int = 0
    evictions: dict[tuple[str, str, str], int] = field(default_factory=dict)  # unit, model, reason


def rules_of(settings: Mapping[str, Any]) -> Optional[Rules]:
    """Rules out of the role's file {reserve_mib, keep}; None where it is empty, so that nothing is done."""
    if not settings:
        return None
    return Rules(int(settings["reserve_mib"]), tuple(map(str, settings["keep"])))


def loaded_models(details: Any) -> list[Loaded]:
    """The models in an answer of /api/ps that have VRAM."""
    listed = details.get("models") if isinstance(details, Mapping) else None
    found = []
    for item in listed if isinstance(listed, list) else []:
        size = item.get("size_vram") if isinstance(item, Mapping) else None
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            name = str(item.get("name") or item.get("model") or "")
            found.append(Loaded(name, size >> 20, expiry(item.get("expires_at"))))
    return found


def expiry(text: Any) -> float:
    """Seconds since 1970 of Go's RFC 3339 (nine digits of a second); 0 if it is none."""
    try:
        # Python before 3.11 takes neither more than six digits nor a Z.
        return datetime.fromisoformat(_FRACTION.sub(r".\1", str(text)).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def established(table: str, port: int) -> int:
    """Connections to a local port in the text of /proc/net/tcp or tcp6."""
    count = 0
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 3 and fields[3] == _ESTABLISHED:
            count += int(fields[1].rpartition(":")[2], 16) == port
    return count


def connections(port: int, proc: str = "/proc") -> Optional[int]:
    """How many connections there are to a port of this machine; None where that cannot be read."""
    count = 0
    try:
        for name in ("tcp", "tcp6"):
            path = os.path.join(proc, "net", name)
            if name == "tcp" or os.path.exists(path):
                with open(path, encoding="ascii") as table:
                    count += established(table.read(), port)
    except (OSError, ValueError):
        return None
    return count


def _kept(model: Loaded, keep: Iterable[str]) -> bool:
    names = {name if ":" in name.rpartition("/")[2] else f"{name}:latest" for name in keep}
    return model.name in names


def decide(
    gpus: Sequence[Mapping[str, Any]],
    models: Optional[Sequence[Loaded]],
    open_connections: Optional[int],
    rules: Rules,
    low_before: int,
    now: float,
) -> Step:
    """
    One idle model, if a card of the report has less free than the reserve, and had so before: what speech
    takes for a moment is no reason. The first to go is the one that nobody asked for longest. `models` is
    None where Ollama is silent.
    """
    memories = [part for gpu in gpus if not gpu["error"] for part in gpu["mig"] or [gpu] if not part["error"]]
    free = min((part["free_mib"] for part in memories), default=rules.reserve_mib)
    if free >= rules.reserve_mib:
        return Step()
    low = low_before + 1
    short = f"{free} MiB of VRAM are free, less than the reserve of {rules.reserve_mib}"
    if low < rules.readings:
        return Step(low)
    if models is None:
        return Step(low, why=f"{short}; Ollama does not tell what it has loaded")
    if not models:
        return Step(low, why=f"{short}; Ollama has no model in VRAM that could be unloaded")
    if open_connections is None:
        return Step(low, why=f"{short}; whether Ollama is at work cannot be read, so nothing is unloaded")
    if open_connections:
        return Step(
            low, why=f"{short}; Ollama may be at work ({open_connections} connections), nothing is unloaded"
        )
    staying = {
        model.name: "is kept" if _kept(model, rules.keep) else "stays for ever (keep_alive)"
        for model in models
        if _kept(model, rules.keep) or model.expires > now + FOR_EVER
    }
    # Past its time, or without one, it is being loaded, unloaded, or worked with.
    staying.update({model.name: "is not at rest" for model in models if model.expires <= now})
    idle = sorted(
        (model for model in models if model.name not in staying),
        key=lambda model: (model.expires, -model.vram_mib, model.name),
    )
    if not idle:
        told = ", ".join(f"{name} {why}" for name, why in sorted(staying.items()))
        return Step(low, why=f"{short}; {told}: nothing is unloaded")
    return Step(low, idle[0].name, f"{short}; {idle[0].name} ({idle[0].vram_mib} MiB) is idle")


def unload(url: str, model: str, timeout: float = 10.0) -> None:
    """Have Ollama at this URL unload a model. Raises ReliefError."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=timeout)
    try:
        connection.request("POST", "/api/generate", body=json.dumps({"model": model, "keep_alive": 0}))
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise ReliefError(f"{model} was not unloaded: {url} does not answer: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise ReliefError(f"{model} was not unloaded: {answer.status} {text.strip()[:300]}")


def counted(state: State, unit: str, model: str, reason: str) -> State:
    """The state after an eviction; the readings begin anew."""
    key = (unit, model, reason)
    return State(0, {**state.evictions, key: state.evictions.get(key, 0) + 1})


def state_of(text: str) -> State:
    """State out of its file. Raises ValueError for what no reading wrote."""
    try:
        data = json.loads(text)
        return State(
            int(data["low"]),
            {(e["unit"], e["model"], e["reason"]): int(e["count"]) for e in data["evictions"]},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"no state of evictions: {error!r}") from error


def text_of(state: State) -> str:
    """State as its file has it."""
    listed = [
        {"unit": unit, "model": model, "reason": reason, "count": count}
        for (unit, model, reason), count in sorted(state.evictions.items())
    ]
    return json.dumps({"low": state.low, "evictions": listed}, indent=1) + "\n"
