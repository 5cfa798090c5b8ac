"""Names of models as people write them, and where a model's files are on this machine."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from voicegate.errors import ModelUnavailable

# Conversions for CTranslate2 on the hub. `.en` knows English only.
REPOSITORIES: dict[str, str] = {
    "tiny": "Systran/faster-whisper-tiny",
    "tiny.en": "Systran/faster-whisper-tiny.en",
    "base": "Systran/faster-whisper-base",
    "base.en": "Systran/faster-whisper-base.en",
    "small": "Systran/faster-whisper-small",
    "small.en": "Systran/faster-whisper-small.en",
    "medium": "Systran/faster-whisper-medium",
    "medium.en": "Systran/faster-whisper-medium.en",
    "large-v1": "Systran/faster-whisper-large-v1",
    "large-v2": "Systran/faster-whisper-large-v2",
    "large-v3": "Systran/faster-whisper-large-v3",
    "large-v3-turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
    "distil-small.en": "Systran/faster-distil-whisper-small.en",
    "distil-medium.en": "Systran/faster-distil-whisper-medium.en",
    "distil-large-v2": "Systran/faster-distil-whisper-large-v2",
    "distil-large-v3": "Systran/faster-distil-whisper-large-v3",
    "distil-large-v3.5": "distil-whisper/distil-large-v3.5-ct2",
}
SYNONYMS: dict[str, str] = {"large": "large-v3", "turbo": "large-v3-turbo"}
# What a request may say for "the model you have"; the first is how OpenAI's clients call Whisper.
DEFAULTS = ("whisper-1", "")

_ORIGINALS = re.compile(r"^(?:openai/)?(?:faster-)?whisper-(.+)$")
_DISTILLED = re.compile(r"^(?:distil-whisper/)?(?:faster-)?distil-(?:whisper-)?(.+)$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")

WEIGHTS = "model.bin"
# Without tokenizer.json faster-whisper would fetch one from the hub while loading.
NEEDED = ("config.json", WEIGHTS, "tokenizer.json")
FILES = ("config.json", "preprocessor_config.json", WEIGHTS, "tokenizer.json", "vocabulary.*")


def is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.match(text))


def short_name(text: str) -> str | None:
    """The plain name (`large-v3-turbo`) for any spelling of a known model, else None."""
    word = text.strip().casefold()
    for repository_name, repository in REPOSITORIES.items():
        if word == repository.casefold():
            return repository_name
    candidates = [word]
    if match := _ORIGINALS.match(word):
        candidates.append(match[1])
    if match := _DISTILLED.match(word):
        candidates.append(f"distil-{match[1]}")
    for candidate in candidates:
        name = SYNONYMS.get(candidate, candidate)
        if name in REPOSITORIES:
            return name
    return None


@dataclass(frozen=True)
class ModelName:
    """A model as configured: a folder on this machine, or a repository on the hub."""

    configured: str
    id: str  # what /v1/models lists
    repository: str | None = None
    folder: Path | None = None

    def matches(self, requested: str) -> bool:
        """Whether a request that names `requested` means this model."""
        word = requested.strip()
        if word in DEFAULTS or word in (self.id, self.configured):
            return True
        if self.folder is not None:
            return word == self.folder.name or word.rstrip("/") == str(self.folder)
        name = short_name(word)
        repository = REPOSITORIES[name] if name else word
        return self.repository is not None and repository.casefold() == self.repository.casefold()


def resolve(text: str) -> ModelName:
    """Which model `text` means; ModelUnavailable with the list of names if none."""
    word = text.strip()
    if not word:
        raise ModelUnavailable(f"no model is given; known names: {known_names()}")
    if name := short_name(word):
        return ModelName(word, name, repository=REPOSITORIES[name])
    path = Path(word).expanduser()
    if path.is_dir():
        folder = path.resolve()
        return ModelName(word, folder.name, folder=folder)
    if word.startswith(("/", "./", "../", "~")):
        raise ModelUnavailable(f"model folder {word} does not exist")
    if is_hub_id(word):
        return ModelName(word, word, repository=word)
    close = difflib.get_close_matches(word.casefold(), [*REPOSITORIES, *SYNONYMS], n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ModelUnavailable(
        f"unknown model {word!r}{hint} Known names: {known_names()};"
        " or a hub id (organisation/name), or a local folder"
    )


def known_names() -> str:
    return ", ".join([*REPOSITORIES, *SYNONYMS])


def locate(model: ModelName, revision: str | None = None) -> Path:
    """The folder with the model's files. Looks at this machine only, never at the network."""
    folder = model.folder or _cached(model, model.repository or "", revision)
    absent = [name for name in NEEDED if not (folder / name).is_file()]
    if absent:
        advice = (
            "it must be a Whisper model in CTranslate2's format"
            if model.folder is not None
            else f"run: {_fetch_command(model, revision)}"
        )
        raise ModelUnavailable(f"{folder} has no {', '.join(absent)}; {advice}")
    return folder


def _cached(model: ModelName, repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:  # not cached, or an id the hub could not have
        at = f" at revision {revision}" if revision else ""
        raise ModelUnavailable(
            f"model {model.configured} ({repository}{at}) is not in the cache {HF_HUB_CACHE};"
            f" run: {_fetch_command(model, revision)}"
        ) from error


def _fetch_command(model: ModelName, revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    home = os.environ.get("HF_HOME")
    return f"{f'HF_HOME={home} ' if home else ''}voicegate fetch --model {model.configured}{at}"
