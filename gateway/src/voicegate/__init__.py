"""A small speech-to-text server with OpenAI's audio API."""

from __future__ import annotations

__version__ = "0.1.0"
