# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==1.26.4",
#     "transformers==4.31.0",
#     "tokenizers==0.13.3",
#     "accelerate==0.21.0",
#     "py-cpuinfo",
# ]
# [tool.rwkv-bench]
# no-deps = ["bigdl-llm==2.4.0"]
# ///
"""BigDL-LLM 2.4.0 on CPU: transformers' RWKV with quantized linear layers; see :mod:`backends.shared.bigdl_session`."""

from __future__ import annotations

from backends.api import BackendInfo, Session
from backends.shared import bigdl_session
from reference.weights import Weights

PACKAGE = bigdl_session.Package(
    backend="bigdl-llm",
    distribution="bigdl-llm",
    module="bigdl.llm.transformers",
    kernels="bigdl.llm.ggml.model.llama.llama_cpp",
    own_bf16=False,
)

INFO = BackendInfo(
    name="bigdl-llm",
    description="Intel BigDL-LLM, low-bit layers in transformers, batch 1; plain AVX kernels on CPUs not from Intel",
    origin="https://github.com/intel-analytics/BigDL, PyPI bigdl-llm",
    devices=("cpu",),
    schemes=bigdl_session.SCHEMES,
    arithmetic_documented=False,
)


def check() -> None:
    PACKAGE.check()


def version() -> str:
    return PACKAGE.version()


def prepare(checkpoint: Weights, scheme: str, device: str) -> None:
    bigdl_session.prepare(PACKAGE, checkpoint, scheme)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    return bigdl_session.load(PACKAGE, checkpoint, scheme, device, threads)
