# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==4.57.6", "numpy>=1.26", "safetensors>=0.4"]
# ///
"""Hugging Face transformers: ``RwkvForCausalLM`` in eager torch. 4.57 is the last line of releases that has it.

Declared arithmetic, read in modeling_rwkv.py: every module computes in the type of the weights, WKV and its
state in float32. The one exception inside WKV: the decay ``exp(time_decay)`` is taken, and so rounded, in
the type of the weights.

``rescale_every`` is 0 here, so that ``fp16`` overflows where plain half precision does; transformers' own
default of 6 would postpone that. Every position's logits are computed in a prompt, as ``model(ids)`` does it.

A known defect is kept out of the way, not mended: one token decoded for a batch of two or more from a state
mixes the sequences (suites/parity/test_transformers_rwkv.py shows it), so sessions are batch 1.

On CUDA, where ``ninja`` and a CUDA compiler are installed, transformers builds a WKV kernel of its own for at
most ``context_length`` (1024) tokens a call and raises beyond; without them it runs the same loop as on CPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from backends.api import BackendInfo, Session, Unavailable, Unsupported
from backends.shared.hf_session import HfSession, hf_folder
from backends.shared.torch_runtime import DTYPES, check_device, check_threads, package_version
from reference.numerics import Arithmetic
from reference.weights import Weights

_INSTALL = "pip install torch 'transformers>=4.40,<5'"

INFO = BackendInfo(
    name="transformers",
    description="Hugging Face transformers, RwkvForCausalLM in eager torch; batch 1, its batched decode being wrong",
    origin="https://github.com/huggingface/transformers, PyPI transformers",
    devices=("cpu", "cuda"),
    schemes={
        "fp32": Arithmetic(),
        "fp16": Arithmetic(activations="fp16", residual="fp16"),
        "bf16": Arithmetic(activations="bf16", residual="bf16"),
    },
)


def check() -> None:
    """Raises Unavailable where torch, or a transformers that has RWKV-4, is not installed; imports neither."""
    if find_spec("torch") is None:
        raise Unavailable("torch is not installed", _INSTALL)
    spec = find_spec("transformers")
    if spec is None:
        raise Unavailable("transformers is not installed", _INSTALL)
    if not any((Path(folder) / "models" / "rwkv").is_dir() for folder in spec.submodule_search_locations or ()):
        raise Unavailable(f"transformers {version()} has no RWKV-4 any more", _INSTALL)


def version() -> str:
    """Version of transformers, without importing it; empty where it is not installed."""
    return package_version("transformers")


def prepare(checkpoint: Weights, scheme: str, device: str) -> None:
    """Write the folder that :func:`load` reads into the cache."""
    hf_folder(checkpoint, scheme)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session with the weights stored as ``scheme``; ``threads`` is torch's. Raises Unavailable or Unsupported."""
    if scheme not in INFO.schemes:
        raise Unsupported(f"transformers has no scheme {scheme!r}; it has {', '.join(INFO.schemes)}")
    check()
    check_threads(threads, INFO.name)
    check_device(device, INFO.name)
    import torch
    from transformers import RwkvForCausalLM

    release = tuple(int(part) for part in version().split(".")[:2])
    kind = {"torch_dtype" if release < (4, 56) else "dtype": getattr(torch, DTYPES[scheme])}
    folder = str(hf_folder(checkpoint, scheme))
    model = RwkvForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True, **kind)
    return HfSession(model.to(device), checkpoint.config, threads, INFO.name)
