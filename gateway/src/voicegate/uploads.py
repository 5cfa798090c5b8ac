"""A multipart form read as it arrives: fields in memory, the file in memory up to 1 MiB, then on disk.

The file on disk has no name from the start, so nothing is left of it however the process ends.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from voicegate import errors

MIB = 1024 * 1024
IN_MEMORY = MIB
FIELD_BYTES = 64 * 1024  # all fields together
FIELDS = 100
# What a form weighs beside its file: boundaries, headers, fields.
FORM_BYTES = FIELD_BYTES + 64 * 1024


class Upload:
    """The uploaded file. Small ones never reach the disk; large ones are written by threads."""

    def __init__(self, limit_mib: int, folder: str = "") -> None:
        self.size = 0
        self._limit_mib = limit_mib
        self._folder = folder or None
        self._pending = bytearray()
        self._file: BinaryIO | None = None

    def feed(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._limit_mib * MIB:
            raise errors.too_large(self._limit_mib)
        self._pending += data

    async def flush(self) -> None:
        """Move what has come in to the disk, once it is too much for memory."""
        if len(self._pending) < IN_MEMORY:
            return
        data, self._pending = self._pending, bytearray()
        try:
            await asyncio.to_thread(self._write, data)
        except OSError as error:
            raise errors.no_space("upload", error.strerror or error) from error

    def _write(self, data: bytearray) -> None:
        if self._file is None:
            self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115
        self._file.write(data)

    def descriptor(self) -> int:
        """The whole file, at its beginning. What never reached the disk becomes a file in memory."""
        if self._file is None:
            self._file = cast(BinaryIO, os.fdopen(os.memfd_create("upload", os.MFD_CLOEXEC), "w+b"))
        if self._pending:
            self._write(self._pending)
            self._pending = bytearray()
        self._file.flush()
        self._file.seek(0)
        return self._file.fileno()

    def close(self) -> None:
        self._pending = bytearray()
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass
class Form:
    fields: dict[str, list[str]] = field(default_factory=dict)
    upload: Upload | None = None

    def get(self, name: str, default: str = "") -> str:
        values = self.fields.get(name)
        return values[-1].strip() if values else default

    def list(self, name: str) -> list[str]:
        """`name` and `name[]`, repeated or with commas."""
        values = self.fields.get(name, []) + self.fields.get(f"{name}[]", [])
        return [part.strip() for value in values for part in value.split(",") if part.strip()]

    def close(self) -> None:
        if self.upload is not None:
            self.upload.close()


class _Reader:
    """Callbacks of the multipart parser."""

    def __init__(self, boundary: bytes, limit_mib: int, folder: str, file_fields: tuple[str, ...]) -> None:
        self.form = Form()
        self.ended = False
        self._file_fields = file_fields
        self._limit_mib = limit_mib
        self._folder = folder
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value: bytearray | Upload = bytearray()
        self._field_bytes = 0
        self._field_count = 0
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def _part_begin(self) -> None:
        self._headers = {}

    def _header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name")
        if name is None:
            raise errors.invalid("A part of the form has no name.")
        self._name = name.decode("utf-8", "replace")
        if self._name in self._file_fields:  # with or without a file name and a content type
            if self.form.upload is not None:
                raise errors.invalid("The form holds more than one file.", self._name)
            self._value = self.form.upload = Upload(self._limit_mib, self._folder)
        else:
            self._field_count += 1
            if self._field_count > FIELDS:
                raise errors.invalid("The form has too many fields.")
            self._value = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if isinstance(self._value, Upload):
            self._value.feed(data[start:end])
            return
        self._field_bytes += end - start
        if self._field_bytes > FIELD_BYTES:
            raise errors.invalid("The fields of the form are too long.", self._name)
        self._value += data[start:end]

    def _part_end(self) -> None:
        if isinstance(self._value, bytearray):
            self.form.fields.setdefault(self._name, []).append(self._value.decode("utf-8", "replace"))

    def _end(self) -> None:
        self.ended = True


def boundary_of(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise errors.invalid("The body must be multipart/form-data with a boundary in its Content-Type.")
    return boundary


async def read_form(
    content_type: str,
    content_length: str,
    chunks: AsyncIterator[bytes],
    *,
    limit_mib: int,
    folder: str = "",
    file_fields: tuple[str, ...] = ("file",),
) -> Form:
    """Read a form. ApiError 413 as soon as it is known to be too large, often before any of it is read."""
    boundary = boundary_of(content_type)
    if content_length.isdigit() and int(content_length) > limit_mib * MIB + FORM_BYTES:
        raise errors.too_large(limit_mib)
    form: Form | None = None
    try:
        reader = _Reader(boundary, limit_mib, folder, file_fields)
        form = reader.form
        async for chunk in chunks:
            reader.parser.write(chunk)
            if form.upload is not None:
                await form.upload.flush()
        if not reader.ended:
            raise errors.invalid("The form ends before its last boundary.")
    except FormParserError as error:
        if form is not None:
            form.close()
        raise errors.invalid(f"The form cannot be read: {error}.") from error
    except BaseException:
        if form is not None:
            form.close()
        raise
    return form
