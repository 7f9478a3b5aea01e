# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==1.26.4",
#     "transformers==4.37.0",
#     "tokenizers==0.15.2",
#     "accelerate==0.23.0",
#     "py-cpuinfo",
# ]
# [tool.rwkv-bench]
# no-deps = ["ipex-llm==2.2.0"]
# ///
"""ipex-llm 2.2.0, BigDL-LLM's successor, on CPU; see :mod:`backends.shared.bigdl_session`."""

from __future__ import annotations

from backends.api import BackendInfo, Session
from backends.shared import bigdl_session
from reference.weights import Weights

PACKAGE = bigdl_session.Package(
    backend="ipex-llm",
    distribution="ipex-llm",
    module="ipex_llm.transformers",
    kernels="ipex_llm.ggml.model.llama.llama_cpp",
    own_bf16=True,
)

INFO = BackendInfo(
    name="ipex-llm",
    description="Intel ipex-llm, low-bit layers in transformers, batch 1; plain AVX kernels on CPUs not from Intel",
    origin="https://github.com/intel-analytics/ipex-llm, PyPI ipex-llm",
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
