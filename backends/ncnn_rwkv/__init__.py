# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["ncnn==1.0.20261020", "numpy>=1.26", "pnnx==20261020", "torch==2.13.0"]
# ///
"""RWKV-4 in ncnn: torch -> pnnx -> ncnn, exported once into the cache.

    __init__    what it offers, and whether it can run here; imports no runtime
    graph       one step of RWKV-4 as a torch module, and the names of its outputs
    export      traces it, runs pnnx, lays the result into the cache
    param_file  edits of ncnn's text format that pnnx has no option for
    session     the contract of backends.api over the exported graph

One step is one run of the graph: a prompt is a loop of single steps, as in faster-rwkv on this engine.
The embedding is looked up outside, in numpy; everything from ln0 on is in the graph.

What ncnn computes with on x86 (src/layer/x86, src/net.cpp at the pinned version):

    fp32   every product and activation float32
    fp16   ``use_fp16_storage``: weights of InnerProduct are kept in half precision and converted as they
           are read; activations stay float32 and sums are float32, because no arithmetic layer of x86
           takes half-precision blobs
    bf16   ``use_bf16_storage``: weights of InnerProduct and every blob between layers are bfloat16, sums
           and LayerNorm statistics float32. The WKV recurrence and its state are taken out of it (a
           feature mask on those layers), as an exponent in bfloat16 is worth nothing.

Vectors (mixing weights, decay, LayerNorm) are float32 in memory under every scheme, with the values that
the scheme leaves them. On ARM the same options mean other arithmetics, so fp16 and bf16 are x86 only here.

No int8: the packages on PyPI hold no tool that quantizes (``ncnn2int8``, ``ncnnllm2int`` are built from
ncnn's source), and ncnn's int8 InnerProduct needs a calibrated scale of its input.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec

from backends.api import BackendInfo, Session, Unavailable, Unsupported
from reference.numerics import Arithmetic
from reference.weights import Weights

#: ncnn's InnerProduct adds up a row in 8 float32 accumulators: the longest chain of RWKV-4 is n_ffn / 8,
#: 384 for 169M, 512 for 430M, 1024 for 1.5B.
_CHAIN = 512

INFO = BackendInfo(
    name="ncnn",
    description="ncnn through pnnx, one graph per step; the engine of faster-rwkv's 'ncnn fp16'",
    origin="https://github.com/Tencent/ncnn",
    devices=("cpu",),
    schemes={
        "fp32": Arithmetic(chain=_CHAIN),
        "fp16": Arithmetic(chain=_CHAIN),
        "bf16": Arithmetic(activations="bf16", residual="bf16", chain=_CHAIN),
    },
)

_X86 = ("x86_64", "amd64", "i686", "i386")


def check() -> None:
    """Raises Unavailable where a package of the environment is missing; imports none of them."""
    for package in ("ncnn", "pnnx", "torch"):
        if find_spec(package) is None:
            raise Unavailable(f"{package} is not installed", "run rwkv-bench setup ncnn")


def version() -> str:
    """Version of ncnn, without importing it; empty where it is not installed."""
    try:
        return installed_version("ncnn")
    except PackageNotFoundError:
        return ""


def prepare(checkpoint: Weights, scheme: str, device: str) -> None:
    """Export the graph into the cache: for 169M some fifteen seconds, and 1 GB of memory and of free disk meanwhile."""
    _check_asked(scheme, device)
    check()
    from backends.ncnn_rwkv.export import exported

    exported(checkpoint, scheme)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session over the exported graph, its matrices stored as ``scheme``.

    ``threads=None`` leaves ncnn's own number of CPU threads. Raises Unavailable or Unsupported.
    """
    _check_asked(scheme, device)
    if threads is not None and threads < 1:
        raise Unsupported(f"ncnn needs at least one CPU thread; {threads} were asked for")
    check()
    from backends.ncnn_rwkv.export import exported
    from backends.ncnn_rwkv.session import NcnnSession, open_net

    return NcnnSession(open_net(exported(checkpoint, scheme), scheme, threads), checkpoint, scheme)


def _check_asked(scheme: str, device: str) -> None:
    if scheme not in INFO.schemes:
        raise Unsupported(f"ncnn has no scheme {scheme!r} here; it has {', '.join(INFO.schemes)}")
    if device != "cpu":
        raise Unsupported(f"ncnn runs on cpu here, not on {device!r}")
    machine = platform.machine()
    if scheme != "fp32" and machine.lower() not in _X86:
        raise Unsupported(f"ncnn's {scheme} is another arithmetic on {machine} than the one declared for x86; use fp32")
