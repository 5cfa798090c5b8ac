# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads a host's apt sources, so that a mirror the user chose is used again and none is named here."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

_OPTIONS = re.compile(r"^(deb(?:-src)?)\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*(.*)$")


@dataclasses.dataclass(frozen=True)
class Source:
    """One enabled stanza (or line) of binary packages."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""


def parse_one_line(text: str) -> list[Source]:
    """A classic sources.list."""
    found = []
    for raw in text.splitlines():
        match = _OPTIONS.match(raw.partition("#")[0].strip())
        if not match or match[1] != "deb":
            continue
        options = dict(part.partition("=")[::2] for part in (match[2] or "").split())
        found.append(Source((match[3],), (match[4],), tuple(match[5].split()), options.get("signed-by", "")))
    return found


def parse_deb822(text: str) -> list[Source]:
    """A .sources file; broken stanzas are passed over, apt itself complains about them."""
    found = []
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, list[str]] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t"):
                if name:
                    fields[name].append(line)
            elif ":" in line:
                name, _unused, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = [value.strip()]
        plain = {key: " ".join(part.strip() for part in lines) for key, lines in fields.items()}
        if plain.get("enabled", "yes").lower() in ("no", "false", "0", "off"):
            continue
        if "deb" not in plain.get("types", "").split() or not plain.get("uris"):
            continue
        found.append(
            Source(
                tuple(plain["uris"].split()),
                tuple(plain.get("suites", "").split()),
                tuple(plain.get("components", "").split()),
                # An inlined key spans lines and must keep them.
                "\n".join(fields.get("signed-by", [])),
            )
        )
    return found


def read_sources(root: str = "/etc/apt") -> list[Source]:
    """Everything apt would read under `root`, in its order; unreadable files count as absent."""
    found: list[Source] = []
    paths = [os.path.join(root, "sources.list")]
    paths += sorted(
        glob.glob(os.path.join(glob.escape(root), "sources.list.d", "*.list"))
        + glob.glob(os.path.join(glob.escape(root), "sources.list.d", "*.sources"))
    )
    for path in paths:
        try:
            with open(path, encoding="utf-8", errors="replace") as handle:
                text = handle.read()
        except OSError:
            continue
        found += parse_deb822(text) if path.endswith(".sources") else parse_one_line(text)
    return found


def _fetchable(uri: str) -> bool:
    """Reachable from elsewhere, and without a password that would end up in an image."""
    parts = urlsplit(uri)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc


def find_suite(sources: Iterable[Source], suite: str, component: str = "main") -> Source | None:
    """The first entry that carries `suite`."""
    for source in sources:
        if suite in source.suites and component in source.components:
            return source
    return None


def backports_source(sources: Iterable[Source], release: str) -> str | None:
    """A deb822 stanza for `release`-backports beside the host's own entry.

    "" if the host has that suite already, None if no entry of the release was found.
    """
    known = list(sources)
    suite = f"{release}-backports"
    if find_suite(known, suite):
        return ""
    own = find_suite(known, release)
    if own is None:
        return None
    stanza = [
        "Types: deb",
        f"URIs: {' '.join(own.uris)}",
        f"Suites: {suite}",
        "Components: main",
    ]
    if own.signed_by:
        stanza.append(f"Signed-By:{'' if own.signed_by.startswith(chr(10)) else ' '}{own.signed_by}")
    return "\n".join(stanza) + "\n"


def image_sources(sources: Iterable[Source], release: str, components: Iterable[str]) -> list[str]:
    """The host's own entries of `release`, its updates and its security suite, as one-line entries.

    Nothing else of the host gets into an image. Empty if the host is of another release: then the
    defaults of mmdebstrap are the right ones.
    """
    wanted = list(components)
    lines: list[str] = []
    seen: set[str] = set()
    for suite in (release, f"{release}-updates", f"{release}-security"):
        for source in sources:
            uri = next((uri for uri in source.uris if _fetchable(uri)), None)
            parts = [name for name in wanted if name in source.components]
            if uri is None or suite not in source.suites or not parts or suite in seen:
                continue
            seen.add(suite)
            lines.append(f"deb {uri} {suite} {' '.join(parts)}")
    if release not in seen or f"{release}-security" not in seen:
        return []
    return lines


def parse_os_release(text: str) -> Mapping[str, str]:
    """/etc/os-release as a mapping."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            try:
                values[name] = "".join(shlex.split(value))
            except ValueError:
                values[name] = value
    return values
