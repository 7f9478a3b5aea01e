"""The targets that ``rwkv-bench compile`` knows, by MLC-LLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backends.api import Unsupported


@dataclass(frozen=True)
class Target:
    """What is generated for a target.

    codegen  TVM's code generator of the kernels
    host     LLVM triple of the code around them; empty for this machine
    linked   whether a library is linked here; else objects in a ``.tar``, to be linked where the target's tools are
    options  what TVM is told of the device besides
    """

    name: str
    codegen: str
    host: str = ""
    linked: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def gpu(self) -> bool:
        """Whether the kernels run on a GPU."""
        return self.codegen != "llvm"

    @property
    def suffix(self) -> str:
        """Ending of what is written."""
        return ".so" if self.linked else ".tar"


_ALL = (
    Target("llvm", "llvm"),
    Target("cuda", "cuda", options=(("arch", "sm_80"),)),
    Target("metal", "metal", "arm64-apple-macos", linked=False),
    Target("metal_x86_64", "metal", "x86_64-apple-macos", linked=False),
    Target("opencl", "opencl"),
    Target("vulkan", "vulkan"),
    Target("webgpu", "webgpu", "wasm32-unknown-unknown-wasm", linked=False),
    Target("android", "opencl", "aarch64-linux-android", linked=False),
    Target("iphone", "metal", "arm64-apple-ios", linked=False),
)

TARGETS = {target.name: target for target in _ALL}


def get(name: str) -> Target:
    """The target of a name; raises :class:`Unsupported` with all names."""
    if name not in TARGETS:
        raise Unsupported(f"no target {name!r}; targets: {', '.join(TARGETS)}")
    return TARGETS[name]


def description(target: Target, cpu: str) -> dict[str, Any]:
    """What TVM is told; ``cpu`` is LLVM's name of this machine's, for code that runs on it."""
    host: dict[str, Any] = {"kind": "llvm", "mtriple": target.host} if target.host else {"kind": "llvm", "mcpu": cpu}
    return {"kind": target.codegen, **dict(target.options), "host": host} if target.gpu else host
