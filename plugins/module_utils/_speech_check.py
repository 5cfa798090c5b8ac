# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Send one recorded sentence to a transcription route, and hold what comes back against what was said."""

from __future__ import annotations

import json
import unicodedata
import urllib.error
import uuid
from collections.abc import Mapping
from typing import Any

from ansible.module_utils.urls import open_url


class SpeechCheckError(Exception):
    """The sentence could not be sent or no text came back; the text says where and why."""


def words(text: str) -> list[str]:
    """Words of text in lower case without punctuation, as they are compared."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c if c.isalnum() or c == "'" else " " for c in folded).split()


def word_error_rate(expected: str, heard: str) -> float:
    """Edits (insert, delete, replace a word) that turn expected into heard, per expected word."""
    reference, hypothesis = words(expected), words(heard)
    if not reference:
        return 0.0 if not hypothesis else 1.0
    row = list(range(len(hypothesis) + 1))
    for i, said in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, got in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (said != got))
    return row[-1] / len(reference)


def multipart(fields: Mapping[str, str], filename: str, audio: bytes) -> tuple[bytes, str]:
    """Body and content type of a form with the fields and one WAV file named file."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    )
    body = b"".join(parts) + head.encode() + audio + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def post(url: str, body: bytes, headers: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """POST and return the JSON object that comes back; SpeechCheckError says what went wrong."""
    try:
        with open_url(url, data=body, headers=dict(headers), method="POST", timeout=timeout) as reply:
            answer = json.loads(reply.read())
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode("utf-8", "replace")
        raise SpeechCheckError(f"POST {url} answered {error.code}: {text}") from None
    except ValueError as error:
        raise SpeechCheckError(f"POST {url} answered no JSON: {error}") from None
    except OSError as error:
        raise SpeechCheckError(f"POST {url} failed: {getattr(error, 'reason', error)}") from None
    if not isinstance(answer, dict):
        raise SpeechCheckError(f"POST {url} answered {type(answer).__name__} where an object was expected")
    return answer


def sign_in(base: str, email: str, password: str, timeout: float) -> str:
    """Token of Open WebUI for the account."""
    body = json.dumps({"email": email, "password": password}).encode()
    answer = post(f"{base}/api/v1/auths/signin", body, {"Content-Type": "application/json"}, timeout)
    token = answer.get("token")
    if not isinstance(token, str) or not token:
        raise SpeechCheckError(f"{base} gave no token for {email}")
    return token


def transcribe(url: str, audio: bytes, *, token: str, fields: Mapping[str, str], timeout: float) -> str:
    """Send audio (a whole WAV file) to url and return the text that comes back."""
    body, content_type = multipart(fields, "sentence.wav", audio)
    headers = {"Content-Type": content_type}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    text = post(url, body, headers, timeout).get("text")
    if not isinstance(text, str):
        raise SpeechCheckError(f"POST {url} answered without a text")
    return text.strip()
