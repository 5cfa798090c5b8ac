# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Wait until a speech-to-text server has its model loaded; exit status 1 says why it has not.

Usage: ready.py [--process PID] [--load ID] [--seconds SECONDS] URL

systemd runs it after the server's start and in its environment, and waits for it even when the server has
ended (--process; empty means that it has). Speaches loads a model only when it is asked to (--load); its key,
if it has one, is in API_KEY.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.parse


class NotReady(Exception):
    """The message says why."""


def ask(url: str, method: str, path: str, timeout: float) -> tuple[int, str]:
    """Status and text of one answer. Raises OSError or HTTPException without one."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=max(0.1, timeout))
    key = os.environ.get("API_KEY", "")
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


def broken(text: str) -> str:
    """Why a server says of itself that it will not get ready; empty if it does not."""
    try:
        told = json.loads(text)
    except ValueError:
        return ""
    return str(told.get("error") or text) if isinstance(told, dict) and told.get("status") == "error" else ""


def ended(process: str) -> bool:
    """Whether a process of this user is gone; systemd's ${MAINPID} is empty when it is."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return True
    return False


def wait(url: str, model: str, seconds: float, process: str | None) -> None:
    """Return when the model is loaded; raises NotReady."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            status, text = ask(url, "GET", "/health", 5)
            problem = f"{url}/health answers {status}"
        except (OSError, http.client.HTTPException) as error:
            status, text, problem = 0, "", f"{url} does not answer: {error}"
        if status == 200:
            break
        if broken(text):
            raise NotReady(broken(text))
        if process is not None and ended(process):
            raise NotReady("its process has ended")
        if time.monotonic() >= deadline:
            raise NotReady(f"not within {seconds:g} s: {problem}")
        time.sleep(0.2)
    if not model:
        return
    path = f"/api/ps/{urllib.parse.quote(model, safe='/')}"
    try:
        status, text = ask(url, "POST", path, deadline - time.monotonic())
    except (OSError, http.client.HTTPException) as error:
        raise NotReady(f"{model} did not load within {seconds:g} s: {error}") from error
    # 409: somebody else has it loaded.
    if status not in (201, 409):
        raise NotReady(f"{model} does not load: {status} {text[:300]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--process")
    parser.add_argument("--load", default="")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("url")
    given = parser.parse_args()
    begin = time.monotonic()
    try:
        wait(given.url, given.load, given.seconds, given.process)
    except NotReady as problem:
        print(f"speech-to-text is not ready: {problem}", file=sys.stderr)
        return 1
    print(f"speech-to-text is ready after {time.monotonic() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
