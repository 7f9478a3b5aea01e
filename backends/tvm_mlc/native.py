"""Whether a file is a library that this process can load, before TVM tries: its own words for it are many lines."""

from __future__ import annotations

import mmap
import platform
import struct
import sys
from pathlib import Path

from reference.errors import CheckpointError

#: ELF's numbers of machines.
_MACHINES = {3: "i386", 8: "mips", 21: "ppc64", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}

_OURS = {"amd64": "x86_64", "arm64": "aarch64", "ppc64le": "ppc64"}

#: First bytes -> what such a file is, where it is no library of Linux.
_OTHERS = {
    b"\xcf\xfa\xed\xfe": "for macOS or iOS",
    b"\xca\xfe\xba\xbe": "for macOS or iOS",
    b"MZ": "for Windows",
    b"\x00asm": "WebAssembly",
    b"!<arch>": "an archive of objects, to be linked first",
    b"\x1f\x8b": "a packed .tar of objects, to be linked with the target's own tools",
}

#: ELF's type of a linked library, its class of 64 bits, and the size of its header then.
_LINKED, _WIDE, _HEADER = 3, 2, 64

#: Begins the name of every symbol of a library for a TVM since the end of 2025, and of one for a TVM before it.
_PRESENT, _PAST = b"__tvm_ffi_", (b"__tvm_main__", b"__tvm_module_ctx", b"__tvm_set_device")


def check(path: Path) -> None:
    """Raises :class:`CheckpointError` in one line for a file of another system or CPU, or for another TVM."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
            wrong = _system(head, path.stat().st_size)
            if wrong is None and head[:4] == b"\x7fELF":
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    wrong = _generation(data)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if wrong is not None:
        raise CheckpointError(f"{path}: is {wrong}")


def _system(head: bytes, size: int) -> str | None:
    if head[:4] == b"\x7fELF":
        return _elf(head, size) if sys.platform.startswith("linux") else "for Linux"
    for first, what in _OTHERS.items():
        if head.startswith(first):
            native = {"darwin": "for macOS or iOS", "win32": "for Windows"}.get(sys.platform)
            return None if what == native else what
    return "no library of any system" if head else "empty"


def _elf(head: bytes, size: int) -> str | None:
    if size < _HEADER:
        return f"truncated: {size} bytes"
    order = {1: "little", 2: "big"}.get(head[5], "")
    if order != sys.byteorder:
        return f"for a {order or 'n unknown'}-endian CPU; this one is {sys.byteorder}-endian"
    kind, number = struct.unpack("=HH", head[16:20])
    machine = _MACHINES.get(number, f"machine {number}")
    here = _OURS.get(platform.machine().lower(), platform.machine().lower())
    if machine != here:
        return f"for {machine}; this machine is {here}"
    if kind != _LINKED:
        return "an object that is not linked yet, not a library"
    # Loading what is cut off would end the process: the table of sections comes last.
    table, each, count = *struct.unpack("=Q", head[40:48]), *struct.unpack("=HH", head[58:62])
    if head[4] == _WIDE and table + each * count > size:
        return f"truncated: {size} bytes of {table + each * count}"
    return None


def _generation(data: mmap.mmap) -> str | None:
    if data.find(_PRESENT) >= 0:
        return None
    if any(data.find(name) >= 0 for name in _PAST):
        return "for a TVM before its present interface (tvm-ffi); build it anew, or with `rwkv-bench compile`"
    return "a library, but not one that TVM made"
