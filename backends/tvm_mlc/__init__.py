# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["apache-tvm==0.27.*", "numpy>=1.26"]
# ///
"""RWKV-4 compiled by Apache TVM, with the entry points and the schemes of MLC-LLM's libraries.

    __init__      what it offers, and whether it can run here; imports no runtime
    storage       how a scheme keeps each tensor, and a library's parameters in order
    params        the params folder: index, shards, chat configuration
    tir_text, rows_cpu, product, products_cpu (gemv, gemm, codes, finish), kernels_*   kernels, written as TVMScript
    graph, graph_trace, points   the Relax module that calls them, and its trace points
    targets, compile, artefacts   compiles it where TVM's compiler is loaded, and looks at what came of it
    export        runs the compiler in a process of its own, and writes the folder
    library, native, arena   opens a library with TVM's runtime alone, and refuses what it is not
    mlc_library   knows one of MLC-LLM's own by its ABI
    states, session, instrument   the contract of backends.api over a library

Declared arithmetic, that of the kernels: values between kernels, the residual stream among them, are of the
model's type (float16 in q*f16_*); inside a kernel, in sums of products and in WKV and its state everything is
float32. A library that is not ours declares sums in the model's type: :func:`mlc_library.arithmetic`.

``RWKV_BENCH_TVM_LIBRARY`` names a library, or the folder it lies in, to run instead of compiling one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backends.api import BackendInfo, Session, Unavailable, Unsupported
from reference.atomic_write import atomic_folder
from reference.config import Config
from reference.errors import CheckpointError
from reference.numerics import Arithmetic
from reference.weights import Weights

VARIABLE = "RWKV_BENCH_TVM_LIBRARY"

_FP32 = Arithmetic()
_FP16 = Arithmetic(activations="fp16", residual="fp16")

INFO = BackendInfo(
    name="tvm",
    description="Apache TVM, compiled for this CPU: kernels in TIR, entry points and schemes of MLC-LLM's libraries",
    origin="https://tvm.apache.org, https://github.com/mlc-ai/mlc-llm",
    devices=("cpu",),
    schemes={
        "q0f32": _FP32,
        "q0f16": _FP16,
        "q3f16_0": _FP16,
        "q3f16_1": _FP16,
        "q4f16_0": _FP16,
        "q4f16_1": _FP16,
        "q4f16_2": _FP16,
        "q4f32_0": _FP32,
        "q4f32_1": _FP32,
        "q8f16_0": _FP16,
        "q8f16_1": _FP16,
    },
)


def check() -> None:
    """Raises Unavailable where TVM or the linker that makes its libraries is missing; imports neither."""
    if find_spec("tvm") is None:
        raise Unavailable("apache-tvm is not installed", "run rwkv-bench setup tvm")
    if VARIABLE not in os.environ and not any(shutil.which(name) for name in ("g++", "gcc", "clang++", "clang")):
        raise Unavailable("no C++ compiler is on the path, and TVM links its libraries by one", "install g++ or clang")


def version() -> str:
    """Version of TVM, without importing it; empty where it is not installed."""
    try:
        return installed_version("apache-tvm")
    except PackageNotFoundError:
        return ""


def prepare(checkpoint: Weights, scheme: str, device: str) -> None:
    """Compile the library and write the parameters into the cache: for 169M some ten seconds."""
    _check_asked(scheme, device)
    check()
    if VARIABLE not in os.environ:
        from backends.tvm_mlc.export import exported

        exported(checkpoint, scheme)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session over the compiled library. ``threads=None`` leaves TVM's own number of CPU threads.

    Raises Unavailable, Unsupported, or CheckpointError for a library of the user's that is of another model.
    """
    return _opened(checkpoint, scheme, device, threads)


def adjust(checkpoint: Weights, scheme: str, device: str, threads: int | None, change: Mapping[str, Any]) -> Session:
    """The same compiled with ``rescale_every``; its kernels fuse operations, of which none can be kept in float32."""
    other = sorted(set(change) - {"rescale_every"})
    if other:
        raise Unsupported(f"tvm cannot change {', '.join(other)}; it can change rescale_every")
    if VARIABLE in os.environ:
        raise Unsupported(f"the library that {VARIABLE} names is as it was compiled")
    return _opened(checkpoint, scheme, device, threads, int(change.get("rescale_every", 0)))


def _opened(checkpoint: Weights, scheme: str, device: str, threads: int | None, rescale_every: int = 0) -> Session:
    _check_asked(scheme, device)
    if threads is not None and threads < 1:
        raise Unsupported(f"TVM needs at least one CPU thread; {threads} were asked for")
    check()
    from backends.tvm_mlc import library, mlc_library, session

    path = library.find(_place(checkpoint, scheme, rescale_every))
    tvm = library.runtime(threads)
    opened, folder, device = library.open_library(path, tvm.cpu()), path.parent / "params", tvm.cpu()
    if not opened.ours:
        found = mlc_library.identify(opened, folder, checkpoint.config, scheme)
        parameters = library.load_parameters(found, folder)
        mlc_library.try_step(found, parameters, folder, device)
        named = all(item.tensor for item in found.parameters)
        return (session.WatchedSession if named else session.MlcSession)(found, parameters, device)
    found = library.identify(opened)
    if found.scheme != scheme:
        raise Unsupported(f"{path} is compiled for {found.scheme}, not for {scheme}")
    _check_sizes(found.config, checkpoint, path)
    return session.FullSession(found, library.load_parameters(found, folder), device)


def compile_model(
    checkpoint: Weights, folder: str, scheme: str, target: str, rescale_every: int = 0, cached: bool = True
) -> dict[str, Any]:
    """What ``rwkv-bench compile`` asks for: a library and its params in ``folder``, which is made; what they are.

    Raises Unavailable, and Unsupported for a scheme or a target that is not offered or not generated here.
    """
    from backends.tvm_mlc import export, targets

    targets.get(target)
    _check_asked(scheme, "cpu")
    check()
    with atomic_folder(folder) as part:
        return export.export(checkpoint, scheme, target, Path(part), rescale_every, cached)


def _check_sizes(found: Config, checkpoint: Weights, path: Path) -> None:
    sizes = ("n_layer", "n_embd", "n_ffn", "n_vocab")
    other = [f"{n} {getattr(found, n)}" for n in sizes if getattr(found, n) != getattr(checkpoint.config, n)]
    if other:
        raise CheckpointError(f"{path}: is compiled for another model than {checkpoint.source}: {', '.join(other)}")


def _place(checkpoint: Weights, scheme: str, rescale_every: int) -> Path:
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    from backends.tvm_mlc.export import exported

    return exported(checkpoint, scheme, rescale_every)


def _check_asked(scheme: str, device: str) -> None:
    if scheme not in INFO.schemes:
        raise Unsupported(f"tvm has no scheme {scheme!r} here; it has {', '.join(INFO.schemes)}")
    if device != "cpu":
        raise Unsupported(f"tvm runs on cpu here, not on {device!r}")
