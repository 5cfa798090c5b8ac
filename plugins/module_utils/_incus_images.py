# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the image of a new machine comes from: a local alias, the public server, or the fallback."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

REMOTE = "images"
_FINGERPRINT = re.compile(r"[0-9a-f]{12,64}")


@dataclasses.dataclass(frozen=True)
class Image:
    """A resolved image. `alias` is local; with `remote` it has to be fetched first (and then is)."""

    wanted: str
    type: str
    alias: str = ""
    fingerprint: str = ""
    remote: str = ""
    note: str = ""
    error: str = ""

    @property
    def source(self) -> dict[str, str]:
        if self.fingerprint:
            return {"type": "image", "fingerprint": self.fingerprint}
        return {"type": "image", "alias": self.alias}


def candidates(wanted: str, instance_type: str) -> list[str]:
    """Local aliases that mean the image `wanted`, best first."""
    names = [wanted]
    if ":" in wanted:
        names.append(wanted.partition(":")[2])
    if instance_type == "virtual-machine":
        # One alias names one image, so the same system for both types needs two.
        names += [f"{name}/vm" for name in names]
    return names


def find_alias(names: Iterable[str], instance_type: str, aliases: Iterable[Mapping[str, Any]]) -> str:
    of_type = {str(a["name"]) for a in aliases if (a.get("type") or "container") == instance_type}
    return next((name for name in names if name in of_type), "")


def resolve(
    wanted: Iterable[tuple[str, str]],
    aliases: list[dict[str, Any]],
    *,
    server: str,
    fallback: str | None,
    probe: Callable[[str], str],
) -> dict[tuple[str, str], Image]:
    """Every distinct (image, instance type) once. `probe(server)` gives "" or why it cannot be reached."""
    result: dict[tuple[str, str], Image] = {}
    unreachable: str | None = None
    for name, itype in sorted(set(wanted)):
        key = (name, itype)
        alias = find_alias(candidates(name, itype), itype, aliases)
        if alias:
            result[key] = Image(name, itype, alias=alias)
            continue
        remote, _unused, tail = name.rpartition(":")
        if not remote and _FINGERPRINT.fullmatch(name):
            result[key] = Image(name, itype, fingerprint=name)
            continue
        reserve = find_alias([fallback] if fallback else [], itype, aliases)
        if remote == REMOTE:
            if unreachable is None:
                unreachable = probe(server)
            if not unreachable:
                taken = {str(a["name"]) for a in aliases}
                local = tail if tail not in taken else f"{tail}/vm"
                result[key] = Image(name, itype, alias=local, remote=tail)
                continue
            why = f"the image server {server} cannot be reached ({unreachable})"
        else:
            there = ", ".join(sorted(str(a["name"]) for a in aliases)) or "none"
            what = f"only {REMOTE}:… is fetched" if remote else f"local aliases: {there}"
            why = f"there is no local image {name!r} ({what})"
        # A misspelt local name must not silently become another system.
        if reserve and remote:
            result[key] = Image(
                name, itype, alias=reserve, note=f"Image {reserve} is used in place of {name}: {why}."
            )
            continue
        hint = "no image_fallback is set"
        if fallback:
            hint = f"the fallback {fallback!r} is no local {itype} image"
        result[key] = Image(
            name,
            itype,
            error=f"No image {name} for a {itype}: {why}, and {hint}. Import one"
            f" (incus image import … --alias {tail}), or correct os_image in infra.yml.",
        )
    return result


def probe_server(server: str, timeout: float = 5.0) -> str:
    """Whether an image server answers, asked once and never longer than `timeout`."""

    import urllib.error

    from ansible.module_utils import urls
    from ansible_collections.sottovoce.stack.plugins.module_utils._deadline import NoAnswer, within

    url = f"{server.rstrip('/')}/streams/v1/index.json"
    if not url.startswith("https://"):
        return "an image server is an https address"
    try:
        status = within(timeout, lambda: urls.open_url(url, timeout=timeout).status)
    except urllib.error.HTTPError as exc:
        return f"it answers {exc.code} {exc.reason}"
    except urllib.error.URLError as exc:
        return str(getattr(exc.reason, "strerror", None) or exc.reason)
    except (OSError, ValueError, urls.ConnectionError, NoAnswer) as exc:
        return str(exc) or type(exc).__name__
    return "" if status == 200 else f"it answers {status}"
