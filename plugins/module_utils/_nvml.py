# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA's management library (libnvidia-ml.so.1) through ctypes: what the cards say of themselves.

Symbols and struct layouts are those of nvml.h; each call takes the newest version that the installed library
has. Nothing here changes a card. Memory is in MiB, temperature in degrees Celsius.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_char, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Optional

MIB = 1024 * 1024
# WSL keeps the library where no loader looks.
LIBRARIES = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")
ENVIRONMENT = "SOTTOVOCE_NVML"

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE = 3, 4, 6, 7
DRIVER_NOT_LOADED, FUNCTION_NOT_FOUND = 9, 13
GPU_IS_LOST, RESET_REQUIRED, LIB_RM_VERSION_MISMATCH, UNKNOWN = 15, 16, 18, 999
ERRORS = {
    1: "NVML was not initialised",
    2: "invalid argument",
    NOT_SUPPORTED: "not supported by this card",
    NO_PERMISSION: "no permission",
    NOT_FOUND: "not found",
    INSUFFICIENT_SIZE: "the buffer was too small",
    8: "an external power cable is not attached properly",
    DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    10: "NVML timed out",
    11: "the kernel found an interrupt issue with a GPU",
    12: "a shared library of the driver was not found",
    FUNCTION_NOT_FOUND: "this driver's NVML lacks the function",
    14: "the infoROM is corrupted",
    GPU_IS_LOST: "the GPU is lost (it fell off the bus or cannot be reached)",
    RESET_REQUIRED: "the GPU needs a reset",
    17: "the operating system or a cgroup blocked the request",
    LIB_RM_VERSION_MISMATCH: "the driver's library and kernel module have different versions",
    19: "the GPU is in use",
    20: "NVML ran out of memory",
    UNKNOWN: "unknown error",
}
# What a card may well not tell without being ill.
_OPTIONAL = (NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, FUNCTION_NOT_FOUND, 21, 25, 26, UNKNOWN)
# nvmlClocksEventReasons: bit to name. The first three, and the display's, are no fault of the card.
REASONS = {
    0x1: "idle",
    0x2: "application_clocks",
    0x4: "power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
}
_NOT_AVAILABLE = 2**64 - 1
_UNSET_INSTANCE = 2**32 - 1


class NvmlMissing(Exception):
    """No library of NVML could be loaded; str() says which were tried."""


class NvmlError(Exception):
    """NVML answered with an error; `code` is its nvmlReturn_t."""

    def __init__(self, code: int, call: str = "") -> None:
        self.code = code
        text = ERRORS.get(code, f"error {code}")
        super().__init__(f"{text} ({call}: {code})" if call else text)


@dataclass(frozen=True)
class Process:
    """A process that uses a card; used_mib is None where the driver does not tell."""

    pid: int
    used_mib: Optional[int]
    kind: str  # compute or graphics
    gpu_instance: Optional[int] = None


@dataclass
class MigDevice:
    """A slice of a card in MIG mode."""

    uuid: str
    name: str = ""
    gpu_instance: Optional[int] = None
    total_mib: int = 0
    used_mib: int = 0
    free_mib: int = 0
    reserved_mib: int = 0
    error: str = ""


@dataclass
class Device:
    """
    One card. total = used + free + reserved (MiB); where the library does not tell what the driver keeps for
    itself, reserved is 0 and used holds it. With `error` set, only what was read before it is filled in.
    None in a field: the card does not tell.
    """

    index: int
    uuid: str = ""
    pci: str = ""
    name: str = ""
    capability: str = ""
    total_mib: int = 0
    used_mib: int = 0
    free_mib: int = 0
    reserved_mib: int = 0
    temperature_c: Optional[int] = None
    clock_reasons: Optional[list[str]] = None
    ecc_corrected: Optional[int] = None  # since the driver was loaded
    ecc_uncorrected: Optional[int] = None
    processes: Optional[list[Process]] = None
    mig_enabled: bool = False
    mig: list[MigDevice] = field(default_factory=list)
    error: str = ""
    error_code: int = 0


class _Memory(ctypes.Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class _MemoryV2(ctypes.Structure):
    _fields_ = [
        ("version", c_uint),
        ("total", c_ulonglong),
        ("reserved", c_ulonglong),
        ("free", c_ulonglong),
        ("used", c_ulonglong),
    ]


class _PciInfo(ctypes.Structure):
    """Of version 3; the fields used here lie in the same place in the older ones, which are shorter."""

    _fields_ = [
        ("bus_id_legacy", c_char * 16),
        ("domain", c_uint),
        ("bus", c_uint),
        ("device", c_uint),
        ("device_id", c_uint),
        ("subsystem_id", c_uint),
        ("bus_id", c_char * 32),
    ]


class _ProcessV1(ctypes.Structure):
    _fields_ = [("pid", c_uint), ("used", c_ulonglong)]


class _Process(ctypes.Structure):
    """Of versions 2 and 3."""

    _fields_ = [
        ("pid", c_uint),
        ("used", c_ulonglong),
        ("gpu_instance", c_uint),
        ("compute_instance", c_uint),
    ]


def reason_names(mask: int) -> list[str]:
    """Names of the bits of nvmlClocksEventReasons that are set."""
    return [name for bit, name in REASONS.items() if mask & bit]


def pci_address(domain: int, bus: int, device: int) -> str:
    """As in /sys/bus/pci/devices; a card is always function 0."""
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


class Nvml:
    """An initialised NVML; use as a context manager, or call close()."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._call(("nvmlInit_v2", "nvmlInit"))

    def __enter__(self) -> Nvml:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session with the driver."""
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library = None

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            try:
                return name, getattr(self._library, name)
            except AttributeError:
                continue
        raise NvmlError(FUNCTION_NOT_FOUND, names[0])

    def _call(self, names: tuple[str, ...], *arguments: Any) -> str:
        """Call the first of names that the library has; gives the name called."""
        name, function = self._find(names)
        code = function(*arguments)
        if code != 0:
            raise NvmlError(code, name)
        return name

    def _number(self, kind: Any, names: tuple[str, ...], *arguments: Any) -> int:
        value = kind()
        self._call(names, *arguments, byref(value))
        return int(value.value)

    def _text(self, name: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(96)
        self._call((name,), *arguments, buffer, c_uint(len(buffer)))
        return buffer.value.decode("utf-8", "replace")

    def driver_version(self) -> str:
        return self._text("nvmlSystemGetDriverVersion")

    def cuda_version(self) -> str:
        """The newest CUDA that the driver can run, such as 12.8."""
        number = self._number(c_int, ("nvmlSystemGetCudaDriverVersion_v2", "nvmlSystemGetCudaDriverVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def devices(self) -> list[Device]:
        """
        Every card that this process may use.

        A card that is lost on the way is there with `error`; cards that are somebody else's are left out.
        Raises NvmlError only where NVML itself fails.
        """
        found = []
        count = self._number(c_uint, ("nvmlDeviceGetCount_v2", "nvmlDeviceGetCount"))
        for index in range(count):
            device = Device(index)
            try:
                handle = c_void_p()
                self._call(
                    ("nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByIndex"),
                    c_uint(index),
                    byref(handle),
                )
                self._read(handle, device)
            except NvmlError as error:
                if error.code == NO_PERMISSION and not device.uuid:
                    continue
                device.error, device.error_code = str(error), error.code
            found.append(device)
        return found

    def _optional(self, function: Any, *arguments: Any) -> Any:
        """What function gives, or None where the card does not tell; a lost card raises."""
        try:
            return function(*arguments)
        except NvmlError as error:
            if error.code not in _OPTIONAL:
                raise
            return None

    def _read(self, handle: c_void_p, device: Device) -> None:
        """Fill device; what was read before an error stays in it."""
        device.uuid = self._text("nvmlDeviceGetUUID", handle)
        device.name = self._text("nvmlDeviceGetName", handle)
        pci = _PciInfo()
        self._call(
            ("nvmlDeviceGetPciInfo_v3", "nvmlDeviceGetPciInfo_v2", "nvmlDeviceGetPciInfo"), handle, byref(pci)
        )
        device.pci = pci_address(pci.domain, pci.bus, pci.device)
        device.capability = self._optional(self._capability, handle) or ""
        self._mig(handle, device)
        self._memory_of_card(handle, device)
        device.temperature_c = self._optional(
            self._number, c_uint, ("nvmlDeviceGetTemperature",), handle, c_uint(0)
        )
        mask = self._optional(
            self._number,
            c_ulonglong,
            ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
            handle,
        )
        device.clock_reasons = None if mask is None else reason_names(mask)
        device.ecc_corrected = self._optional(self._ecc, handle, 0)
        device.ecc_uncorrected = self._optional(self._ecc, handle, 1)
        device.processes = self._optional(self._processes, handle) or device.processes

    def _capability(self, handle: c_void_p) -> str:
        major, minor = c_int(), c_int()
        self._call(("nvmlDeviceGetCudaComputeCapability",), handle, byref(major), byref(minor))
        return f"{major.value}.{minor.value}"

    def _memory_of_card(self, handle: c_void_p, device: Device) -> None:
        try:
            self._memory(handle, device)
        except NvmlError as error:
            # Who has a slice only may not be told of the whole card.
            if error.code not in _OPTIONAL or not device.mig:
                raise
            for key in ("total_mib", "used_mib", "free_mib", "reserved_mib"):
                setattr(device, key, sum(getattr(mig, key) for mig in device.mig))

    def _memory(self, handle: c_void_p, into: Device | MigDevice) -> None:
        second = _MemoryV2(version=ctypes.sizeof(_MemoryV2) | 2 << 24)
        try:
            self._call(("nvmlDeviceGetMemoryInfo_v2",), handle, byref(second))
        except NvmlError as error:
            # An older library, or one that does not know this version of the struct.
            if error.code not in (FUNCTION_NOT_FOUND, 25, 2):
                raise
            first = _Memory()
            self._call(("nvmlDeviceGetMemoryInfo",), handle, byref(first))
            total, used, reserved = first.total, first.used, 0
        else:
            total, used, reserved = second.total, second.used, second.reserved
        into.total_mib, into.used_mib, into.reserved_mib = total // MIB, used // MIB, reserved // MIB
        # Rounded so that the four add up.
        into.free_mib = max(0, into.total_mib - into.used_mib - into.reserved_mib)

    def _ecc(self, handle: c_void_p, kind: int) -> int:
        # Counter type 0: volatile, since the driver was loaded.
        return self._number(c_ulonglong, ("nvmlDeviceGetTotalEccErrors",), handle, c_uint(kind), c_uint(0))

    def _processes(self, handle: c_void_p) -> list[Process]:
        found: dict[int, Process] = {}
        for word in ("Graphics", "Compute"):
            base = f"nvmlDeviceGet{word}RunningProcesses"
            listed = self._optional(self._process_list, handle, base)
            if listed is None and word == "Compute":
                raise NvmlError(NOT_SUPPORTED, base)
            for entry in listed or ():
                instance = getattr(entry, "gpu_instance", _UNSET_INSTANCE)
                # A process that draws and computes is in both lists, with the same figure.
                found[entry.pid] = Process(
                    int(entry.pid),
                    None if entry.used == _NOT_AVAILABLE else int(entry.used) // MIB,
                    word.lower(),
                    None if instance == _UNSET_INSTANCE else int(instance),
                )
        return sorted(found.values(), key=lambda process: process.pid)

    def _process_list(self, handle: c_void_p, base: str) -> list[Any]:
        name, function = self._find((f"{base}_v3", f"{base}_v2", base))
        layout = _ProcessV1 if name == base else _Process
        room = 64
        while True:
            count, entries = c_uint(room), (layout * room)()
            code = function(handle, byref(count), entries)
            if code == 0:
                return list(entries[: count.value])
            # Processes may come between two calls; nothing has as many as this.
            if code != INSUFFICIENT_SIZE or room > 1 << 16:
                raise NvmlError(code, name)
            room = max(count.value, room) * 2

    def _mig(self, handle: c_void_p, device: Device) -> None:
        current, pending = c_uint(), c_uint()
        try:
            self._call(("nvmlDeviceGetMigMode",), handle, byref(current), byref(pending))
            if current.value != 1:
                return
            device.mig_enabled = True
            most = self._number(c_uint, ("nvmlDeviceGetMaxMigDeviceCount",), handle)
        except NvmlError as error:
            if error.code not in _OPTIONAL:
                raise
            return
        for index in range(most):
            child = c_void_p()
            try:
                self._call(("nvmlDeviceGetMigDeviceHandleByIndex",), handle, c_uint(index), byref(child))
            except NvmlError as error:
                if error.code in (NOT_FOUND, NO_PERMISSION, 2):
                    continue
                raise
            mig = MigDevice(self._text("nvmlDeviceGetUUID", child))
            mig.name = self._optional(self._text, "nvmlDeviceGetName", child) or ""
            mig.gpu_instance = self._optional(self._number, c_uint, ("nvmlDeviceGetGpuInstanceId",), child)
            try:
                self._memory(child, mig)
            except NvmlError as error:
                mig.error = str(error)
            device.mig.append(mig)
            # For those who may not list the processes of the whole card.
            listed = self._optional(self._processes, child)
            if listed is not None:
                device.processes = [*(device.processes or ()), *listed]


def open_nvml(path: str | None = None) -> Nvml:
    """
    Load and initialise NVML: path, else the file in SOTTOVOCE_NVML, else the system's library.

    Raises NvmlMissing where there is no library, NvmlError where it cannot be initialised.
    """
    named = path or os.environ.get(ENVIRONMENT)
    tried = []
    for name in (named,) if named else LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            tried.append(str(error))
            continue
        return Nvml(library)
    raise NvmlMissing("; ".join(tried))
