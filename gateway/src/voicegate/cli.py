"""`voicegate serve`, `voicegate fetch` and `voicegate key`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from voicegate import __version__, keys, logs, models
from voicegate.engine import Engine
from voicegate.errors import ModelUnavailable, SettingsError
from voicegate.settings import Settings, add_arguments

if TYPE_CHECKING:
    from voicegate.wyoming_server import Wyoming

EXIT_FAILED = 1  # the model cannot be loaded, the port is taken
EXIT_SETTINGS = 2  # wrong settings, or the model is not on this machine
EXIT_UNREACHABLE = 3  # fetch: no way to the hub
EXIT_NOT_FOUND = 4  # fetch: the hub has no such model or revision
EXIT_GATED = 5  # fetch: the hub gives it only to who has accepted its conditions

SOCKET_MESSAGE = 16 * 1024 * 1024  # bytes; OpenAI allows 15 MiB of audio in one
HUB_TIMEOUT = 5.0  # seconds until an unreachable hub is given up


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="voicegate", description="A speech-to-text server with OpenAI's audio API.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"voicegate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="run the server",
        description="Run the server. Every option can be set as VOICEGATE_<NAME> in the environment;"
        " the key also as VOICEGATE_API_KEY. The model must be on this machine: see 'voicegate fetch'.",
        epilog=f"Known models: {models.known_names()}.",
        allow_abbrev=False,
    )
    add_arguments(serve)
    fetch = commands.add_parser(
        "fetch",
        help="download a model from the hub into its cache (HF_HOME)",
        epilog=f"Known models: {models.known_names()}."
        " Exit status: 2 wrong name, 3 hub unreachable, 4 not found, 5 gated.",
        allow_abbrev=False,
    )
    which = fetch.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="TEXT", help="name or hub id")
    which.add_argument("--diarization-model", metavar="TEXT", help="hub id of a pipeline of pyannote.audio")
    fetch.add_argument("--revision", default=None, metavar="TEXT", help="commit, tag or branch [main]")
    fetch.add_argument(
        "--hf-token-file",
        default=None,
        metavar="TEXT",
        help="file with a token of the hub, which gated models need; also HF_TOKEN",
    )
    key = commands.add_parser(
        "key",
        help="make an API key",
        epilog="The key is shown once. Limits can follow on its line: NAME:SHA256:per_minute=60,concurrent=4",
        allow_abbrev=False,
    )
    key.add_argument("name", metavar="NAME", help="whose it is; it is seen in the log and in metrics")
    given = vars(parser.parse_args(arguments))
    command = given.pop("command")
    if command == "key":
        return make_key(given["name"])
    if command == "fetch":
        token = None
        if given["hf_token_file"]:
            try:
                token = Path(given["hf_token_file"]).read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                print(f"voicegate: --hf-token-file: {error}", file=sys.stderr)
                return EXIT_SETTINGS
        if given["diarization_model"]:
            return fetch_diarization_model(given["diarization_model"], given["revision"], token)
        return fetch_model(given["model"], given["revision"], token)
    try:
        settings = Settings.load(given)
    except SettingsError as error:
        for problem in error.problems:
            print(f"voicegate: {problem}", file=sys.stderr)
        return EXIT_SETTINGS
    return run_server(settings)


def run_server(settings: Settings) -> int:
    logs.configure(settings.log_level, settings.log_format)
    # Whatever a library might want to look up or report: this process talks to its clients only.
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = models.resolve(settings.model)
    folder: Path | None = None
    live_folder: Path | None = None
    option = "model"
    if not settings.upstream:
        try:
            folder = models.locate(model, settings.revision or None)
            if settings.live_model:
                option = "live-model"
                live_folder = models.locate(
                    models.resolve(settings.live_model), settings.live_revision or None
                )
        except ModelUnavailable as error:
            print(f"voicegate: --{option}: {error}", file=sys.stderr)
            return EXIT_SETTINGS

    from voicegate import diarizer

    try:
        diarizer.check(settings)
    except ModelUnavailable as error:
        print(f"voicegate: --diarization: {error}", file=sys.stderr)
        return EXIT_SETTINGS

    try:
        return asyncio.run(_serve(settings, model, folder, live_folder))
    except KeyboardInterrupt:
        return 130


def make_engine(settings: Settings, folder: Path | None, live_folder: Path | None = None) -> Engine:
    """The model in `folder` and the small one in `live_folder`, or the upstream if there is none."""
    if folder is None:
        from voicegate.upstream import UpstreamEngine

        return UpstreamEngine(settings)
    from voicegate.process import ProcessEngine

    return ProcessEngine(settings, folder, live_folder)


async def start_wyoming(settings: Settings, model: models.ModelName, engine: Engine) -> Wyoming | None:
    """None if it is not wanted, or its port cannot be had, which is logged."""
    if settings.wyoming_port < 0:
        return None
    from voicegate.wyoming_server import Wyoming

    server = Wyoming(settings, model, engine)
    try:
        await server.start()
    except OSError as error:
        logs.event(
            "cannot_listen", level=logging.ERROR, host=settings.host, port=settings.wyoming_port,
            error=error.strerror,
        )  # fmt: skip
        return None
    return server


async def _serve(
    settings: Settings, model: models.ModelName, folder: Path | None, live_folder: Path | None
) -> int:
    import uvicorn

    from voicegate import diarizer, peace
    from voicegate.api import create_app
    from voicegate.jobs import Jobs
    from voicegate.live_sessions import LiveSessions
    from voicegate.metrics import MeasuredEngine, Metrics, read_gpu
    from voicegate.store import StoreError

    engine = make_engine(settings, folder, live_folder)
    metrics = Metrics()
    measured = MeasuredEngine(engine, metrics)
    sessions = LiveSessions(settings, measured)
    speakers = diarizer.make(settings)
    try:
        jobs = await Jobs.open(settings, measured, speakers) if settings.data_dir else None
    except StoreError as error:
        print(f"voicegate: --data-dir: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    config = uvicorn.Config(
        create_app(
            settings,
            model,
            measured,
            jobs,
            metrics,
            gpu=None if settings.device == "cpu" else functools.partial(read_gpu, settings.device_index),
            turns=lambda: peace.counted(getattr(engine, "peace", None)),
            sessions=sessions,
            diarizer=speakers,
        ),
        host=settings.host,
        port=settings.port,
        http="h11",
        ws="websockets-sansio",
        ws_max_size=SOCKET_MESSAGE,
        # A client that is told to wait with its audio answers pings late.
        ws_ping_timeout=60.0,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn's own sends itself the signal again at the end, which skips our clean-up.
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = (sockets or [])[0].getsockname()[:2]
            logs.event(
                "listening",
                host=host,
                port=port,
                model=model.id,
                auth="key" if settings.api_key or settings.api_keys_file else "none",
                version=__version__,
            )

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if jobs is not None:
                jobs.end_streams()  # else it waits for clients that wait for a job
            await super().shutdown(sockets)

    server = Server(config)
    try:
        sockets = [config.bind_socket()]
        # asyncio sets it only on sockets of a named protocol, which uvicorn's are not; without it the body of
        # an answer waits until the client has acknowledged its head: 40 ms.
        sockets[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except SystemExit:  # uvicorn has logged the reason, but not the address
        logs.event("cannot_listen", level=logging.ERROR, host=settings.host, port=settings.port)
        if jobs is not None:
            await jobs.stop()
        await engine.stop()
        return EXIT_FAILED
    wyoming = await start_wyoming(settings, model, measured)
    if settings.wyoming_port >= 0 and wyoming is None:
        if jobs is not None:
            await jobs.stop()
        await engine.stop()
        return EXIT_FAILED
    failure: list[str] = []

    async def load() -> None:
        # While this runs /health says 503 and requests wait in the queue.
        try:
            await engine.start()
        except ModelUnavailable as error:
            failure.append(str(error))
            logs.event("model_load_failed", level=logging.ERROR, error=str(error))
            server.should_exit = True

    loading = asyncio.create_task(load())
    if jobs is not None:
        jobs.start()
    try:
        await server.serve(sockets)
    finally:
        loading.cancel()
        if wyoming is not None:
            await wyoming.stop()
        await sessions.stop()
        if jobs is not None:
            await jobs.stop()
        if speakers is not None:
            await speakers.stop()
        await engine.stop()
        for item in sockets:
            item.close()
    return EXIT_FAILED if failure else 0


def make_key(name: str) -> int:
    try:
        key, line = keys.create(name)
    except ValueError as error:
        print(f"voicegate: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    print(f"key (shown only now):                {key}")
    print(f"line for the file of --api-keys-file: {line}")
    return 0


def fetch_model(name: str, revision: str | None, token: str | None) -> int:
    try:
        model = models.resolve(name)
    except ModelUnavailable as error:
        print(f"voicegate: --model: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    if model.repository is None:
        print(
            f"voicegate: --model: {name} is a folder on this machine; there is nothing to fetch",
            file=sys.stderr,
        )
        return EXIT_SETTINGS
    folder = _download(model.repository, revision, token, list(models.FILES))
    if isinstance(folder, int):
        return folder
    try:
        models.locate(model, revision)
    except ModelUnavailable as error:
        print(f"voicegate: {error}", file=sys.stderr)
        return EXIT_NOT_FOUND
    print(folder)
    return 0


def fetch_diarization_model(name: str, revision: str | None, token: str | None) -> int:
    from voicegate import diarizer

    if not models.is_hub_id(name):
        print(f"voicegate: --diarization-model: {name!r} is no hub id (organisation/name)", file=sys.stderr)
        return EXIT_SETTINGS
    folder = _download(name, revision, token)
    if isinstance(folder, int):
        return folder
    try:
        diarizer.locate(str(folder))
    except ModelUnavailable as error:
        print(f"voicegate: {error}", file=sys.stderr)
        return EXIT_NOT_FOUND
    print(folder)
    return 0


def _download(
    repository: str, revision: str | None, token: str | None, patterns: list[str] | None = None
) -> Path | int:
    """The folder in the hub's cache with the files; or an exit status, when what is wrong was printed."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision}" if revision else ""
    try:
        # First a small question with a short timeout: the download itself would retry for minutes.
        found = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT, token=token)
        print(f"fetching {repository}{at or ' ' + (found.sha or '')}", file=sys.stderr)
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT, token=token
        )
    except GatedRepoError:
        print(
            f"voicegate: {repository} is gated: the hub gives it only to who has accepted its conditions.\n"
            f"voicegate: accept them at {constants.ENDPOINT}/{repository}, make a token that may read at"
            f" {constants.ENDPOINT}/settings/tokens, and give it with --hf-token-file or HF_TOKEN",
            file=sys.stderr,
        )
        return EXIT_GATED
    except (RepositoryNotFoundError, RevisionNotFoundError):
        print(f"voicegate: the hub has no public model {repository}{at}", file=sys.stderr)
        return EXIT_NOT_FOUND
    except HfHubHTTPError as error:
        print(f"voicegate: {constants.ENDPOINT} refused {repository}: {error}", file=sys.stderr)
        return EXIT_UNREACHABLE
    except Exception as error:  # name resolution, connection, timeout, TLS: the client's own kinds of each
        print(
            f"voicegate: the hub at {constants.ENDPOINT} cannot be reached: {error}\n"
            "voicegate: set HF_ENDPOINT to a mirror, or copy the model to this machine and give its folder"
            " as the model",
            file=sys.stderr,
        )
        return EXIT_UNREACHABLE
    return Path(folder)
