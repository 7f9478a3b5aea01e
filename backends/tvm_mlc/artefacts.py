"""What a compilation leaves, and whether it is all there: looked at without running it."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

from backends.tvm_mlc.targets import Target

#: First bytes of the objects and libraries that hosts have.
_OBJECTS = {
    b"\x7fELF": "ELF",
    b"\xcf\xfa\xed\xfe": "Mach-O",
    b"\x00asm": "WebAssembly",
    b"!<ar": "archive",
}

#: Endings of the kernels' source beside the library.
SOURCES = {"cuda": ".cu", "metal": ".metal", "opencl": ".cl", "webgpu": ".wgsl"}


class Incomplete(Exception):
    """A compilation that ended without an error and lacks something; one line."""


def write(executable: Any, kernels: list[str], entries: list[str], target: Target, folder: Path) -> dict[str, Any]:
    """Write the library, and the kernels' source beside it, as ``folder/rwkv4*``; what they are.

    Raises :class:`Incomplete` where a kernel or an entry point is missing in them.
    """
    path = folder / f"rwkv4-{target.name}{target.suffix}"
    executable.export_library(str(path))
    told: dict[str, Any] = {"library": path.name, "target": target.name, "bytes": path.stat().st_size}
    told["objects"] = sorted(set(objects(path)))
    if not told["objects"] or "unknown" in told["objects"]:
        raise Incomplete(f"{path.name} holds {', '.join(told['objects']) or 'nothing'}, not objects of a host")
    known = executable.stats()
    missing = [name for name in entries if name not in known]
    if missing:
        raise Incomplete(f"{path.name} lacks the entry points {', '.join(missing)}")
    if target.gpu:
        source = _source(executable.mod, target.codegen)
        missing = [name for name in kernels if f"{name}_kernel" not in source]
        if missing:
            raise Incomplete(f"the {target.codegen} source lacks {len(missing)} kernels, first {missing[0]}")
        (folder / f"rwkv4-{target.name}{SOURCES[target.codegen]}").write_text(source)
        told["source_bytes"] = len(source)
    return {**told, "kernels": len(kernels), "entries": entries}


def objects(path: Path) -> list[str]:
    """Kinds of the objects in a library or a ``.tar`` of objects."""
    if path.suffix != ".tar":
        with path.open("rb") as file:
            return [_kind(file.read(4))]
    found = []
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            data = archive.extractfile(member)
            if data is not None:
                found.append(_kind(data.read(4)))
    return found


def _kind(head: bytes) -> str:
    return _OBJECTS.get(head, "unknown")


def _source(module: Any, codegen: str) -> str:
    """Source of the kernels of a GPU, from the module of that kind among those a module imports."""
    if module.kind == codegen:
        return str(module.inspect_source(""))
    return "".join(_source(part, codegen) for part in module.imports)
