"""Other processes on an NVIDIA GPU, its clock and temperature, asked of its driver's library (NVML) by ctypes.

``nvidia-smi`` shows the same and takes up to a second to start. Who else computes is counted: processes by
number, this one's own left out. In a container the numbers may be those of the host, where this process
cannot find itself; so the count when watching began, of a device this process already uses, is taken as the
undisturbed one. Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Any

from harness import cuda_order

_CLOCK_SM, _TEMPERATURE_GPU = 1, 0
_MOST_PROCESSES = 256


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t of version 2 and later."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class GpuWatch:
    """One device of NVML's."""

    def __init__(self, library: Any, device: Any) -> None:
        self._library, self._device = library, device
        self._usual: int | None = None

    @classmethod
    def of(cls, device: str, library: Any = None) -> GpuWatch | None:
        """Of ``cuda`` or ``cuda:1``; ``None`` where there is no NVIDIA driver, or no such device."""
        kind, _, number = device.partition(":")
        if kind != "cuda":
            return None
        if library is None:
            try:
                library = ctypes.CDLL("libnvidia-ml.so.1")
            except OSError:
                return None
        try:
            if library.nvmlInit_v2() != 0:
                return None
            found = ctypes.c_void_p()
            if not find_device(library, int(number or 0), found):
                return None
        except AttributeError:
            return None
        return cls(library, found)

    def look(self) -> dict[str, float]:
        """Others' processes, MHz and degrees; what the driver does not tell is left out."""
        found: dict[str, float] = {}
        pids = self._pids()
        if pids is not None:
            others = len([pid for pid in pids if pid != os.getpid()])
            if os.getpid() in pids or self._usual is None:
                self._usual = 0 if os.getpid() in pids else others
            found["gpu_others"] = max(0, others - self._usual)
        for name, ask, what in (
            ("gpu_mhz", "nvmlDeviceGetClockInfo", _CLOCK_SM),
            ("gpu_celsius", "nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
        ):
            value = ctypes.c_uint()
            with suppress(AttributeError):
                if getattr(self._library, ask)(self._device, what, ctypes.byref(value)) == 0:
                    found[name] = value.value
        return found

    def _pids(self) -> list[int] | None:
        processes = (_Process * _MOST_PROCESSES)()
        count = ctypes.c_uint(_MOST_PROCESSES)
        for name in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"):
            with suppress(AttributeError):
                if getattr(self._library, name)(self._device, ctypes.byref(count), processes) == 0:
                    return [processes[i].pid for i in range(count.value)]
        return None


def find_device(library: Any, number: int, found: ctypes.c_void_p) -> bool:
    """The device that CUDA calls ``number``, by index or by UUID; none where that is not known for certain."""
    listed = cuda_order.words()
    if listed is not None and number >= len(listed):
        return False
    name = str(number) if listed is None else listed[number]
    if not name.isdigit():
        return bool(library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(found)) == 0)
    if not cuda_order.by_bus() and _count(library) != 1:
        return False
    return bool(library.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(found)) == 0)


def _count(library: Any) -> int:
    """How many devices the driver has; 0 where it does not tell."""
    found = ctypes.c_uint()
    return int(found.value) if library.nvmlDeviceGetCount_v2(ctypes.byref(found)) == 0 else 0
