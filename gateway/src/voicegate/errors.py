"""Errors as OpenAI's API shapes them: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any


class VoicegateError(Exception):
    """What cannot be done, as a sentence for the person who runs the server."""


class SettingsError(VoicegateError):
    """The server must not start with these settings; holds every problem at once."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ModelUnavailable(VoicegateError):
    """The model's files are not on this machine, or cannot be loaded."""


class ApiError(Exception):
    """An answer other than success, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def missing(param: str) -> ApiError:
    return invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")


def bad_audio(detail: str) -> ApiError:
    return invalid(f"The file could not be read as audio: {detail}.", "file", "invalid_audio")


def decode_timeout(seconds: float) -> ApiError:
    return invalid(
        f"Decoding the audio took longer than this server allows ({seconds:g} seconds).",
        "file",
        "decode_timeout",
    )


def decode_memory(limit_mib: int) -> ApiError:
    return invalid(
        f"Decoding the audio needs more memory than this server allows ({limit_mib} MiB).",
        "file",
        "decode_memory",
    )


def decode_crashed() -> ApiError:
    return invalid(
        "The file could not be read as audio: its decoder crashed over it.", "file", "decode_crashed"
    )


def too_large(limit_mib: int) -> ApiError:
    return ApiError(
        413,
        f"The upload is larger than this server takes ({limit_mib} MiB).",
        param="file",
        code="file_too_large",
    )


def unauthorized(given: bool) -> ApiError:
    message = (
        "Incorrect API key provided."
        if given
        else "You didn't provide an API key. Send it in the header 'Authorization: Bearer KEY'."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def unknown_model(name: str, served: list[str]) -> ApiError:
    names = ", ".join(f"'{item}'" for item in served)
    return ApiError(
        404,
        f"The model '{name}' does not exist here. This server serves {names}.",
        param="model",
        code="model_not_found",
    )


def queue_full(limit: int, retry_after: int) -> ApiError:
    return ApiError(
        429,
        f"The server is busy: {limit} requests are already waiting. Try again in {retry_after} s.",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def live_limit(limit: int) -> ApiError:
    message = (
        f"There are {limit} live sessions already, which is as many as this server takes."
        if limit
        else "This server takes no live sessions (--live-limit is 0)."
    )
    return ApiError(
        429, message, type="rate_limit_error", code="live_limit_exceeded", headers={"Retry-After": "5"}
    )


def unknown_session(name: str) -> ApiError:
    return ApiError(
        404, f"There is no live session '{name}' any more. Begin a new one.", param="session",
        code="session_not_found",
    )  # fmt: skip


def idle(seconds: float) -> ApiError:
    return ApiError(408, f"Nothing was sent for {seconds:g} seconds.", code="session_idle")


def foreign_origin(origin: str) -> ApiError:
    return ApiError(
        403,
        f"Pages of {origin} may not speak to this server (see --cors-origins).",
        code="origin_not_allowed",
    )


def key_limit(limit: str, retry_after: int) -> ApiError:
    return ApiError(
        429,
        f"This API key allows {limit}. Try again in {retry_after} s.",
        type="rate_limit_error",
        code="key_limit_exceeded",
        headers={"Retry-After": str(retry_after)},
    )


def no_space(what: str, reason: object) -> ApiError:
    return ApiError(
        507, f"The server could not store the {what}: {reason}.", type="server_error", code="no_space"
    )


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, type="server_error", code=code)


def load_failed() -> ApiError:
    return unavailable("The model cannot be loaded. The server's log says why.", "model_load_failed")


def engine_down() -> ApiError:
    return unavailable(
        "The speech engine ended while it worked on this request; it is being started again.", "engine_down"
    )


def out_of_memory() -> ApiError:
    return unavailable("The device ran out of memory.", "out_of_memory")


def engine_unreachable(url: str) -> ApiError:
    return unavailable(f"The speech engine at {url} cannot be reached.", "engine_unreachable")


def engine_timeout(seconds: int) -> ApiError:
    return ApiError(
        504,
        f"The speech engine did not answer within {seconds} s.",
        type="server_error",
        code="engine_timeout",
    )


def engine_answer(detail: str) -> ApiError:
    return ApiError(
        502,
        f"The speech engine's answer cannot be read: {detail}.",
        type="server_error",
        code="engine_answer",
    )


def no_diarization() -> ApiError:
    return invalid(
        "Nothing on this server tells speakers apart, so it cannot give 'diarized_json'. Its operator can"
        " switch that on (--diarization).",
        "response_format",
        "diarization_unavailable",
    )


def not_diarized() -> ApiError:
    return invalid(
        "Speakers were not told apart in this job. Hand the recording in again, with response_format"
        " diarized_json.",
        "format",
        "not_diarized",
    )


def diarization_not_loaded(reason: str) -> ApiError:
    return unavailable(f"Speakers cannot be told apart now: {reason}.", "diarization_not_loaded")


def diarization_down() -> ApiError:
    return unavailable("What tells speakers apart ended while it worked on this request.", "diarization_down")


def diarization_unreachable(url: str) -> ApiError:
    return unavailable(f"What tells speakers apart, {url}, cannot be reached.", "diarization_unreachable")


def diarization_timeout(seconds: int) -> ApiError:
    return ApiError(
        504,
        f"Telling the speakers apart took longer than {seconds} s.",
        type="server_error",
        code="diarization_timeout",
    )


def diarization_answer(detail: str) -> ApiError:
    return ApiError(
        502,
        f"The answer about who spoke when cannot be read: {detail}.",
        type="server_error",
        code="diarization_answer",
    )


def vram_busy(models: list[str]) -> ApiError:
    error = unavailable(
        f"The card is taken by {', '.join(models)}, and only one may be on it at a time.",
        "vram_busy",
    )
    error.headers["Retry-After"] = "10"
    return error


def only_english(model: str) -> ApiError:
    return invalid(f"The model '{model}' knows only English.", "language", "unsupported_language")


def internal() -> ApiError:
    return ApiError(
        500,
        "The server had an error while processing your request. Its log says more.",
        type="server_error",
        code="internal_error",
    )


def ears_down() -> ApiError:
    return unavailable("The process that listens ended unexpectedly. Connect again.", "ears_down")
