# /// script
# requires-python = ">=3.9"
# dependencies = ["numpy>=1.26"]
# [tool.rwkv-bench]
# no-deps = ["rwkv-cpp-python==0.0.1"]
# ///
"""rwkv.cpp on CPU, by ctypes on its ``librwkv``: the packaged library of April 2023, or the user's own.

    __init__  what it offers; the contract of backends.api
    library   finding, binding and calling a library
    files     the model files it reads
    session   a session over a loaded model

``rwkv-cpp-python`` 0.0.1 is the April 2023 sources; pip builds them with make and the C and C++ compilers
found on the path. ``RWKV_CPP_LIBRARY`` names the absolute path of a newer library. What an API has is seen
by its symbols, never by a version.

The packaged library has single tokens only: a prompt is a loop of them, and its prefill is no faster than
its decode. A newer one runs a prompt in chunks of a length for which its graph fits (:mod:`.session`).

Declared arithmetic, read in ggml.c and ggml-cpu.c. Only inputs of matrix products are ever rounded, the
rest is float32, sums of LayerNorm double:

    FP32                      not at all
    FP16                      to fp16
    Q4_1_O                    not in the layers; in the head to fp16, where the quantized file was FP16
    Q4_0, Q5_0, Q8_0          to int8 per block of 32, fp16 scale (Q8_0)
    Q4_1, Q5_1                the same, the sum of a block's inputs in fp16 besides (Q8_1)
    Q4_K, Q5_K                to int8 per block of 256, fp32 scale (Q8_K)
    Q4_0_v100, Q4_1_v100      to the weights' own int4 format: in April 2023 ggml had no int8 one

Embedding and head stay in the type of the file that is quantized (:mod:`.files`), so in the other quantized
schemes the inputs of the head are rounded less than is declared: to fp16, or not at all.
"""

from __future__ import annotations

import os
from pathlib import Path

from backends.api import BackendInfo, Session, Unsupported
from backends.rwkv_cpp import files
from backends.rwkv_cpp.library import APRIL, PACKAGE, VARIABLE, Library, library_path, open_library
from reference.numerics import Arithmetic
from reference.weights import Weights

_INT8, _INT8_K = Arithmetic(activations="int8x32"), Arithmetic(activations="int8x256")

INFO = BackendInfo(
    name="rwkv.cpp",
    description="rwkv.cpp's librwkv, ggml on CPU; the packaged library of April 2023 prefills token by token",
    origin="https://github.com/RWKV/rwkv.cpp, PyPI rwkv-cpp-python",
    devices=("cpu",),
    schemes={
        "FP32": Arithmetic(),
        "FP16": Arithmetic(activations="fp16in"),
        "Q4_0": _INT8,
        "Q4_1": _INT8,
        "Q5_0": _INT8,
        "Q5_1": _INT8,
        "Q8_0": _INT8,
        "Q4_K": _INT8_K,
        "Q5_K": _INT8_K,
        "Q4_0_v100": Arithmetic(activations="int4x32"),
        "Q4_1_v100": Arithmetic(activations="uint4x32"),
        "Q4_1_O": Arithmetic(activations="fp16in"),
    },
    usual=(
        ("FP32", "FP16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K")
        if VARIABLE in os.environ
        else ("FP32", "FP16", "Q4_0_v100", "Q4_1_v100", "Q4_1_O")
    ),
)


def check() -> None:
    """Raises Unavailable where there is no library; loads none."""
    library_path()


def version() -> str:
    """Version of the package, or the hash of the user's library, which does not tell its own."""
    path = library_path()
    return PACKAGE if path.packaged else f"librwkv sha256 {path.digest()}"


def prepare(checkpoint: Weights, scheme: str, device: str) -> None:
    """Write the model file that :func:`load` reads into the cache, quantized by the library itself."""
    _model_file(open_library(), checkpoint, scheme)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session with the weights stored as ``scheme``.

    ``threads=None`` is half the CPUs, as in rwkv.cpp's own Python wrapper. Raises Unavailable or Unsupported.
    """
    from backends.rwkv_cpp.session import open_session

    if device != "cpu":
        raise Unsupported(f"rwkv.cpp runs on cpu here, not on {device!r}; layers are not offloaded")
    library = open_library()
    return open_session(library, _model_file(library, checkpoint, scheme), checkpoint.config, threads)


def _model_file(library: Library, checkpoint: Weights, scheme: str) -> Path:
    if scheme not in INFO.schemes:
        raise Unsupported(f"rwkv.cpp has no scheme {scheme!r}; it has {', '.join(INFO.schemes)}")
    if scheme in library.schemes:
        return files.model_file(library, checkpoint, scheme)
    if scheme in APRIL.schemes:
        raise Unsupported(f"{scheme} left rwkv.cpp in 2023; {PACKAGE} has it: unset RWKV_CPP_LIBRARY")
    raise Unsupported(f"{scheme} is newer than {PACKAGE}; name a newer librwkv in RWKV_CPP_LIBRARY")
