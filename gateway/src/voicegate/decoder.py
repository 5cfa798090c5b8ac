"""Decoding in a process of its own for every upload, so that no file can harm more than its own request.

`python -m voicegate.decoder DESCRIPTOR LEVEL FORMAT`, started by `Decoder`, has loaded PyAV and little else.
It forks for each upload, which takes milliseconds where a new Python takes a tenth of a second and more. The
child has a limit on its memory and one on its time, both kept by the kernel, and writes the samples into a
file in memory that the engine then maps.

To the process: one message for each upload, JSON with three files: the upload, the file for the samples, a
pipe for the answer. Through the pipe: `{}` or `error` from the child, or else `ended` with its return code.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import wave
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from voicegate import audio, errors, logs, wire
from voicegate.errors import ApiError
from voicegate.settings import Settings

MIB = 1024 * 1024
LOOK = 0.2  # seconds between two looks whether a request was cancelled
GRACE = 2.0  # seconds beyond its limit until a decoder that does not look at the clock is ended
MESSAGE = 4096  # bytes; what goes through a pipe in one piece


class Decoder:
    """The engine's side. May be used by several threads at once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._start()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "voicegate.decoder", str(theirs.fileno()),
                   self._settings.log_level, self._settings.log_format]  # fmt: skip
        with theirs:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        self._control = ours
        return ours

    def _ask(self, message: bytes, files: list[int]) -> None:
        """Hand an upload over, to a new process if the last one is gone."""
        with self._lock:
            if self._control is not None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    socket.send_fds(self._control, [message], files)
                    return
            self.close()
            socket.send_fds(self._start(), [message], files)

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
            self._process.kill()
            self._process.wait()

    def decode(self, source: BinaryIO, cancelled: Callable[[], bool]) -> mmap.mmap | None:
        """Signed 16-bit samples, 16 kHz, mono; None once `cancelled`. ApiError (400) for the client."""
        limits = {
            "memory": self._settings.max_decode_mib,
            "seconds": self._settings.max_decode_seconds,
            "max_seconds": self._settings.max_audio_minutes * 60,
        }
        samples = os.memfd_create("samples", os.MFD_CLOEXEC)
        try:
            for last in (False, True):
                answer = self._answer(json.dumps(limits).encode(), [source.fileno(), samples], cancelled)
                if answer is None:
                    return None
                if answer:
                    self._raise(json.loads(answer))
                    return mmap.mmap(samples, 0, prot=mmap.PROT_READ)
                # Nobody is there to say what became of it, so this upload need not be to blame.
                if last:
                    break
                os.lseek(source.fileno(), 0, os.SEEK_SET)
                os.ftruncate(samples, 0)
                os.lseek(samples, 0, os.SEEK_SET)
            raise errors.internal()
        finally:
            os.close(samples)

    def _answer(self, message: bytes, files: list[int], cancelled: Callable[[], bool]) -> bytes | None:
        """Empty if the process is gone."""
        ours, theirs = os.pipe()
        try:
            try:
                self._ask(message, [*files, theirs])
            finally:
                os.close(theirs)
            while not select.select([ours], [], [], LOOK)[0]:
                if cancelled():  # the child sees that nobody reads any more
                    return None
            return os.read(ours, MESSAGE)
        finally:
            os.close(ours)

    def _raise(self, answer: dict[str, Any]) -> None:
        if error := answer.get("error"):
            raise wire.error_from(error)
        if (code := answer.get("ended")) is None:
            return
        logs.event("decoder_ended", level=logging.WARNING, code=code)
        if code == -signal.SIGALRM:
            raise errors.decode_timeout(self._settings.max_decode_seconds)
        if code == -signal.SIGKILL:  # the kernel's, for want of memory
            raise errors.decode_memory(self._settings.max_decode_mib)
        raise errors.decode_crashed() if code < 0 else errors.internal()


# -- the process


def serve(control: socket.socket) -> None:
    """Fork for every upload, until the engine is gone."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    warm_up()
    answers: dict[int, int] = {}  # pipes, by process
    while True:
        readable, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in readable:
            os.read(woken, MESSAGE)
            reap(answers)
        if control.fileno() in readable:
            message, files, _flags, _address = socket.recv_fds(control, MESSAGE, 3)
            if not message:
                return
            process = os.fork()
            if process == 0:
                for descriptor in (control.fileno(), woken, wake, *answers.values()):
                    os.close(descriptor)
                child(json.loads(message), *files)
            upload, samples, answers[process] = files
            os.close(upload)
            os.close(samples)


def warm_up() -> None:
    """Do once what every child would have to do, and leave it in memory that is shared with them."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 48000, 0, "NONE", ""))
        writer.writeframes(bytes(48000))  # half a second
    file.seek(0)
    audio.decode(file, io.BytesIO())
    gc.disable()
    gc.freeze()


def reap(answers: dict[int, int]) -> None:
    """Say of children that ended by themselves how they did."""
    while answers:
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            return
        answer = answers.pop(process)
        if code := os.waitstatus_to_exitcode(status):
            say(answer, {"ended": code})
        os.close(answer)


def say(answer: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(answer, json.dumps(message).encode())


def child(limits: dict[str, Any], upload: int, samples: int, answer: int) -> NoReturn:
    """Decode, answer, end. Never returns, whatever happens."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        restrict(limits["memory"], limits["seconds"] + GRACE)
        say(answer, decoded(limits, upload, samples, answer))
        code = 0
    except BaseException:
        logs.logger.exception("decoding_failed")
    finally:
        os._exit(code)


def restrict(mib: int, seconds: float) -> None:
    # Where memory is short, the kernel ends this process first; where that cannot be said, it chooses.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    # All that can be written to and is not shared; the samples are shared.
    present = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = mib * MIB if present == resource.RLIM_INFINITY else min(present, mib * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def decoded(limits: dict[str, Any], upload: int, samples: int, answer: int) -> dict[str, Any]:
    """What is to be answered."""
    reader = select.poll()
    reader.register(answer, 0)  # without its reader a pipe has an error
    try:
        with os.fdopen(upload, "rb") as source, os.fdopen(samples, "wb") as target:
            audio.decode(
                source,
                target,
                max_seconds=limits["max_seconds"],
                timeout=limits["seconds"],
                cancelled=lambda: bool(reader.poll(0)),
            )
    except ApiError as error:
        return {"error": wire.error_to(error)}
    except MemoryError:
        return {"error": wire.error_to(errors.decode_memory(limits["memory"]))}
    return {}


def main() -> None:
    logs.configure(sys.argv[2], sys.argv[3])
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
