# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["numpy>=1.26", "onnx==1.23.2", "onnxruntime==1.31.1"]
# ///
"""RWKV-4 on ONNX Runtime's CPU kernels: prefill and decode as one graph, int4 and int8 by MatMulNBits.

    __init__    what it offers, and whether it can run here; imports no runtime
    schemes     what is kept and computed with, by scheme name
    graph       RWKV-4 as a graph of ONNX operators
    graph_file  writing that graph, and its weights beside it
    export      both, into the cache or a folder of the user's
    session     the contract of backends.api over them

The embedding, ln0 and the lookup of tokens are in the graph: its two files are all that another program needs.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

from backends.api import BackendInfo, Session, Unavailable, Unsupported
from backends.onnx_cpu.schemes import INT8, SCHEMES
from reference.config import tensor_shapes
from reference.weights import Weights

INFO = BackendInfo(
    name="onnx",
    description="ONNX Runtime on CPUs, prefill and decode as one graph; int4 by MatMulNBits",
    origin="https://github.com/microsoft/onnxruntime",
    devices=("cpu",),
    schemes={name: kept.arithmetic for name, kept in SCHEMES.items()},
    usual=(
        "fp32",
        "ort_int4_g32_asym",
        "ort_int4_g32_asym_att8_int8act",
        "ort_int4_g128_asym_att8_int8act",
        "ort_int8_g32",
        "ort_int8_g128_int8act",
    ),
)

_X86 = ("x86_64", "amd64")


def check() -> None:
    """Raises Unavailable where a package of the environment is missing; imports none of them."""
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise Unavailable(f"{package} is not installed", "run rwkv-bench setup onnx")


def version() -> str:
    """Version of ONNX Runtime, without importing it; empty where it is not installed."""
    try:
        return installed_version("onnxruntime")
    except PackageNotFoundError:
        return ""


def prepare(checkpoint: Weights, scheme: str, device: str) -> None:
    """Export the graph into the cache: some seconds for 169M, in memory the largest matrix a few times over."""
    _check_asked(checkpoint, scheme, device)
    check()
    from backends.onnx_cpu.export import exported

    exported(checkpoint, scheme)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session over the exported graph.

    ``threads=None`` leaves ONNX Runtime's own number, the physical cores. Raises Unavailable, Unsupported,
    or ConfigError where the scheme's groups do not divide a row of the model.
    """
    _check_asked(checkpoint, scheme, device)
    if threads is not None and threads < 1:
        raise Unsupported(f"onnx needs at least one CPU thread; {threads} were asked for")
    check()
    from backends.onnx_cpu.export import exported
    from backends.onnx_cpu.session import OnnxSession, open_graph

    return OnnxSession(open_graph(exported(checkpoint, scheme), threads), checkpoint.config)


def export(checkpoint: Weights, scheme: str, folder: Path) -> Path:
    """Write the graph as ``folder/model.onnx``, its weights beside it as ``weights.bin``; the graph's path.

    It runs in any program with ONNX Runtime; inputs and outputs are those of :mod:`backends.onnx_cpu.graph`.
    Raises ConfigError where the scheme's groups do not divide a row of the model.
    """
    _check_asked(checkpoint, scheme, "cpu")
    check()
    from backends.onnx_cpu.export import MODEL, write

    write(checkpoint, scheme, folder)
    return folder / MODEL


def _check_asked(checkpoint: Weights, scheme: str, device: str) -> None:
    if scheme not in SCHEMES:
        raise Unsupported(f"onnx has no scheme {scheme!r}; it has {', '.join(SCHEMES)}")
    if device != "cpu":
        raise Unsupported(f"onnx runs on cpu here, not on {device!r}")
    machine = platform.machine()
    if SCHEMES[scheme].accuracy == INT8 and machine.lower() not in _X86:
        exact = scheme.replace("_int8act", "") if scheme.replace("_int8act", "") in SCHEMES else "fp32"
        raise Unsupported(f"{scheme} is another arithmetic on {machine} than the one declared for x86; use {exact}")
    SCHEMES[scheme].check(tensor_shapes(checkpoint.config))
