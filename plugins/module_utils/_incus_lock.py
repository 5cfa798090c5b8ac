# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One run at a time against one server."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator


class LockError(Exception):
    """Somebody else holds the lock; str() is the message for the user."""


def lock_path(where: str) -> str:
    """One file per server: the socket's real path, or the URL. /run/lock is shared by all users."""
    if where.startswith("/"):
        where = os.path.realpath(where)
    name = f"sottovoce-{hashlib.sha256(where.encode()).hexdigest()[:16]}.lock"
    for folder in ("/run/lock", "/var/lock", os.environ.get("XDG_RUNTIME_DIR") or "", tempfile.gettempdir()):
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return os.path.join(folder, name)
    return os.path.join(tempfile.gettempdir(), name)


def _open(path: str) -> int:
    # The file may be another user's: never create through it, never follow a link there.
    for _again in range(10):
        for mode in (os.O_RDWR, os.O_RDONLY):
            try:
                handle = os.open(path, mode | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                break
            except PermissionError:
                continue
            if stat.S_ISREG(os.fstat(handle).st_mode):
                return handle
            os.close(handle)
            raise LockError(f"{path} is in the way of the lock of this server: remove it.")
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue
        return handle
    raise LockError(f"Cannot open the lock file {path}: another user's, and unreadable. Remove it.")


@contextlib.contextmanager
def hold(
    path: str,
    timeout: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Hold the lock; gives a note if somebody else had to be waited for, else an empty string."""
    try:
        handle = _open(path)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise LockError(f"{path} is a link where the lock of this server should be: remove it.") from exc
        raise LockError(f"Cannot open the lock file {path}: {exc.strerror or exc}.") from exc
    try:
        began = clock()
        other = ""
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                other = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
                if clock() - began >= timeout:
                    raise LockError(
                        f"Another run (process {other}) is working on the same server, and has not ended"
                        f" within {timeout:g} s. Wait for it, or raise lock_timeout. Lock file: {path}."
                    ) from None
                sleep(0.1)
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield f"Waited {clock() - began:.0f} s for another run (process {other})." if other else ""
    finally:
        # The file stays: removing it would let two holders in.
        os.close(handle)
