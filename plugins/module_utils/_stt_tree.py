# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A folder as one archive: its digest, packing it, unpacking it in one step."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

MARKER = ".stt-source.json"
IGNORED = frozenset(
    {".git", ".venv", "__pycache__", "node_modules", ".mypy_cache", ".ruff_cache", ".pytest_cache", MARKER}
)
CARD = """---
library_name: ctranslate2
tags:
- audio
- automatic-speech-recognition
---
A speech model that was copied here from a folder.
"""


class TreeError(Exception):
    """A folder or archive that cannot be used; the message is for the user."""


def walk(root: Path, include: Iterable[str] = ()) -> Iterator[tuple[str, Path]]:
    """Yield (relative name, path) of every file below root, sorted, without caches and environments."""
    tops = set(include)
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in IGNORED and not name.endswith(".egg-info")]
        for name in files:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if name in IGNORED or name.endswith(".pyc") or not path.is_file():
                continue
            if tops and relative.split("/", 1)[0] not in tops:
                continue
            found.append((relative, path))
    yield from sorted(found)


def digest(root: Path, include: Iterable[str] = ()) -> str:
    """Return one sha256 over names, executable bits and contents. Independent of how it was packed."""
    whole = hashlib.sha256()
    for relative, path in walk(root, include):
        with path.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        executable = "x" if path.stat().st_mode & stat.S_IXUSR else "-"
        whole.update(f"{executable} {content} {relative}\n".encode())
    return whole.hexdigest()


def pack(root: Path, archive: Path, include: Iterable[str] = ()) -> None:
    """Write root's files to a tar archive (not compressed: weights do not shrink)."""
    with tarfile.open(archive, "w") as tar:
        for relative, path in walk(root, include):
            tar.add(path.resolve(), arcname=relative, recursive=False)


def _members(archive: Path) -> Iterator[tuple[str, bool, bytes]]:
    """Yield (name, executable, content) of the plain files in a tar or zip archive."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as bundle:
                for info in bundle.infolist():
                    if not info.is_dir():
                        yield (
                            info.filename,
                            bool((info.external_attr >> 16) & stat.S_IXUSR),
                            bundle.read(info),
                        )
            return
        with tarfile.open(archive) as tar:
            for member in tar:
                handle = tar.extractfile(member) if member.isfile() else None
                if handle is not None:
                    yield member.name, bool(member.mode & stat.S_IXUSR), handle.read()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise TreeError(f"{archive} is no tar or zip archive that can be read: {error}") from error


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the plain files of an archive into folder, without the single folder archives wrap them in."""
    files = [(PurePosixPath(name), executable, content) for name, executable, content in _members(archive)]
    if not files:
        raise TreeError(f"{archive} holds no files.")
    for name, _executable, _content in files:
        if name.is_absolute() or ".." in name.parts:
            raise TreeError(f"{archive} holds a file outside of its folder: {name}")
    wrapped = len({name.parts[0] for name, _e, _c in files}) == 1 and all(
        len(name.parts) > 1 for name, _e, _c in files
    )
    for name, executable, content in files:
        target = folder.joinpath(*name.parts[1:] if wrapped else name.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o755 if executable else 0o644)


def recorded(dest: Path) -> str:
    """Return the digest of what was put at dest, or nothing."""
    try:
        return str(json.loads((dest / MARKER).read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def install(archive: Path, dest: Path, expected: str, *, as_hub_cache: bool = False) -> None:
    """Put the archive's files at dest by one rename, after holding them to the expected digest."""
    dest.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        plain = scratch / "plain"
        plain.mkdir()
        unpack(archive, plain)
        found = digest(plain)
        if found != expected:
            raise TreeError(f"What arrived for {dest} has the digest {found}, expected was {expected}.")
        result = plain
        if as_hub_cache:
            # The layout that huggingface_hub reads: refs/main names the snapshot.
            result = scratch / "hub"
            (result / "refs").mkdir(parents=True)
            (result / "refs" / "main").write_text(expected[:40], encoding="utf-8")
            (result / "snapshots").mkdir()
            card = plain / "README.md"
            if not card.exists() or "library_name" not in card.read_text(encoding="utf-8", errors="replace"):
                card.write_text(CARD, encoding="utf-8")
            plain.rename(result / "snapshots" / expected[:40])
        (result / MARKER).write_text(json.dumps({"digest": expected}) + "\n", encoding="utf-8")
        for folder, _folders, files in os.walk(result):
            os.chmod(folder, 0o755)  # noqa: S103  (read by the service's own user)
            for name in files:
                path = os.path.join(folder, name)
                os.chmod(path, 0o755 if os.stat(path).st_mode & stat.S_IXUSR else 0o644)
        if dest.exists():
            dest.rename(scratch / "old")
        result.rename(dest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prune(dest: Path, keep: int) -> list[str]:
    """Remove the oldest siblings of dest that were put there in the same way, so that keep are left."""
    siblings = [path for path in dest.parent.iterdir() if path != dest and recorded(path)]
    siblings.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    removed = siblings[max(keep - 1, 0) :]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return [str(path) for path in removed]


def normal_archive(source: Path, include: Iterable[str], scratch: Path) -> Path:
    """Return an archive with the wanted files of a folder or archive."""
    target = scratch / "source.tar"
    if source.is_dir():
        pack(source, target, include)
        return target
    plain = scratch / "plain"
    plain.mkdir()
    unpack(source, plain)
    pack(plain, target, include)
    return target


def source_digest(source: Path, include: Iterable[str] = ()) -> str:
    """Return the digest of a folder's or an archive's wanted files."""
    if source.is_dir():
        return digest(source, include)
    if not source.is_file():
        raise TreeError(f"There is no {source}.")
    with tempfile.TemporaryDirectory() as folder:
        unpack(source, Path(folder))
        return digest(Path(folder), include)
