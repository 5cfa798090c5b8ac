"""A process of our own, with a socket between it and the server."""

from __future__ import annotations

import asyncio
import socket
import sys


async def spawn(module: str) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """`python -m MODULE DESCRIPTOR`; what it gets and what we get are the two ends of a Unix socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, str(theirs.fileno()),
            stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
        )  # fmt: skip
    return process, ours
