"""What BigDL-LLM and its successor ipex-llm share: how they quantize, keep and load an RWKV-4, and what they compute.

Both replace every linear layer of transformers' ``RwkvForCausalLM``, the head included, by one of blocks of
64 quantized weights; embedding, LayerNorms and time mixing stay float32. Found in their Python sources
(``transformers/low_bit_linear.py``, ``convert.py``) and, for the closed ``libllama_*.so``, by calling its
kernels on single layers beside numpy on the dequantized weights:

* A product rounds its inputs to int8 per block of 64 with a float32 scale, multiplies integers, and adds in
  float32. With that emulated, kernels for AVX, AVX2, AVX-VNNI and AVX512-VNNI agree with numpy to 5e-7, at
  1 row and at 64; without, they are 0.6 % off. No document says so.
* From 96 rows (ipex-llm: 512) on a CPU with AVX512-VNNI but not AVX-VNNI, ``sym_int4`` is dequantized and
  multiplied in float32 instead, which is closer to the weights than is declared here.
* On a CPU whose vendor is not Intel the library takes its plain AVX kernels, whatever the CPU has.
* ``bf16`` and ``fp32`` are transformers' own layers in that type (ipex-llm: its BF16Linear, the same product).

The large errors of logits in ``sym_int4`` are those of the stored weights, a matter of quality: on the synthetic
169m they are 24 % (rms) from those of the fp32 weights, with exact products as with these kernels, which
alone make 1.6 %. In ``sym_int8`` either makes 1.6 %. A weight that is NaN is given some code, without a word.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backends.api import Session, Unavailable, Unsupported
from backends.shared.torch_runtime import DTYPES, check_threads, package_version
from reference.codecs_bigdl import BLOCK
from reference.config import Config
from reference.converted import derived
from reference.numerics import Arithmetic
from reference.weights import Weights

_INT8_INPUTS = Arithmetic(activations="int8x64")

#: Scheme -> arithmetic, for both packages.
SCHEMES = {
    "sym_int4": _INT8_INPUTS,
    "asym_int4": _INT8_INPUTS,
    "sym_int5": _INT8_INPUTS,
    "sym_int8": _INT8_INPUTS,
    "bf16": Arithmetic(activations="bf16", residual="bf16"),
    "fp32": Arithmetic(),
}


@dataclass(frozen=True)
class Package:
    """One of the two.

    module    has their AutoModelForCausalLM
    kernels   has the handle ``_lib`` of their library
    own_bf16  whether bf16 is one of their low-bit types; else it is transformers' ``torch_dtype``
    """

    backend: str
    distribution: str
    module: str
    kernels: str
    own_bf16: bool

    def version(self) -> str:
        return package_version(self.distribution)

    def check(self) -> None:
        """Raise Unavailable where the package is not installed; imports nothing of it."""
        if find_spec(self.module.split(".")[0]) is None or not self.version():
            raise Unavailable(f"{self.distribution} is not installed", f"run: rwkv-bench setup {self.backend}")


def prepare(package: Package, checkpoint: Weights, scheme: str) -> None:
    """Write the quantized model, or the Hugging Face folder of a float type, into the cache."""
    _check_blocks(package, checkpoint.config, scheme)
    model_folder(package, checkpoint, scheme)


def load(package: Package, checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session over ``checkpoint``; raises Unavailable or Unsupported."""
    if device != "cpu":
        raise Unsupported(f"{package.backend} has no device {device!r} here; it has cpu")
    if scheme not in SCHEMES:
        raise Unsupported(f"{package.backend} has no scheme {scheme!r}; it has {', '.join(SCHEMES)}")
    package.check()
    check_threads(threads, package.backend)
    _check_blocks(package, checkpoint.config, scheme)
    from backends.shared.hf_session import HfSession

    folder = str(model_folder(package, checkpoint, scheme))
    if scheme in DTYPES:
        model = _in_float(package, folder, scheme)
    else:
        model = _auto_model(package).load_low_bit(folder, optimize_model=False)
    session = HfSession(model, checkpoint.config, threads, package.backend, inference_mode=True)
    _check_kernel_threads(package, threads)
    return session


def _check_blocks(package: Package, config: Config, scheme: str) -> None:
    if scheme not in DTYPES and (config.n_embd % BLOCK or config.n_ffn % BLOCK):
        raise Unsupported(
            f"{package.backend} quantizes in blocks of {BLOCK} weights, which do not divide rows of "
            f"{config.n_embd} and {config.n_ffn}; it takes this model as fp32 or bf16"
        )


def _auto_model(package: Package) -> Any:
    """The package's AutoModelForCausalLM."""
    # Read when a model is converted: without it, ipex-llm gives only the last of more than 10 positions.
    os.environ["IPEX_LLM_LAST_LM_HEAD"] = "0"
    import torch  # noqa: F401 - before the package, so that its kernels share torch's OpenMP pool

    return importlib.import_module(package.module).AutoModelForCausalLM


def model_folder(package: Package, checkpoint: Weights, scheme: str) -> Path:
    """What ``load`` reads, cached: the package's own low-bit folder, or a plain Hugging Face folder."""
    from backends.shared.hf_session import hf_folder

    if scheme in DTYPES:
        return hf_folder(checkpoint, scheme)

    def quantize(path: Path) -> None:
        package.check()
        source = str(hf_folder(checkpoint, _float_type(checkpoint)))
        model = _auto_model(package).from_pretrained(source, load_in_low_bit=scheme, optimize_model=False)
        model.save_low_bit(str(path))

    return derived(checkpoint, f"{package.distribution}-{package.version()}-{scheme}", quantize)


def _float_type(checkpoint: Weights) -> str:
    """The scheme that keeps every tensor as it is; quantizing starts from float32 values either way."""
    stored = {tensor.stored for _, tensor in checkpoint.items()}
    return {"f16": "fp16", "bf16": "bf16"}.get(stored.pop(), "fp32") if len(stored) == 1 else "fp32"


def _in_float(package: Package, folder: str, scheme: str) -> Any:
    """The model in a float type. ipex-llm 2.2.0 drops ``torch_dtype`` without a word where nothing is low-bit."""
    import torch

    dtype = getattr(torch, DTYPES[scheme])
    own = scheme == "bf16" and package.own_bf16
    options = {"load_in_low_bit": "bf16"} if own else {"torch_dtype": dtype}
    model = _auto_model(package).from_pretrained(folder, optimize_model=False, **options)
    wrong = {str(p.dtype) for p in model.parameters() if p.dtype != dtype}
    if wrong:
        raise Unsupported(
            f"{package.backend} loads this model as {', '.join(sorted(wrong))} where {scheme} was asked for"
        )
    return model


def _check_kernel_threads(package: Package, threads: int | None) -> None:
    """Torch's number of threads must be that of the kernels too: one OpenMP runtime serves both."""
    if threads is None:
        return
    found = int(importlib.import_module(package.kernels)._lib.omp_get_max_threads())
    if found != threads:
        raise Unsupported(f"the kernels of {package.backend} run {found} threads where {threads} were asked for")
