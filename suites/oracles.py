"""Two implementations that share no line with the reference, as sessions the reference itself is held against.

They are the backends ``rwkv`` and ``transformers``, run in this process whatever their headers say: the test
environment has both packages. torch and they are imported only when one is opened.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from backends import rwkv_pip, transformers_rwkv
from backends.api import BackendModule, Session
from backends.shared.hf_session import HfSession
from reference.checkpoint import save_checkpoint
from reference.weights import Weights

ORACLES: dict[str, BackendModule] = {"rwkv": rwkv_pip, "transformers": transformers_rwkv}


def open_oracle(name: str, weights: Weights, threads: int = 1) -> Session:
    """A float32 session on the CPU; raises Unavailable where the package is not installed."""
    return ORACLES[name].load(weights, "fp32", "cpu", threads)


def open_rescaling(weights: Weights, every: int, folder: Path, threads: int = 1) -> HfSession:
    """transformers as it runs by default: x is halved after every so many layers, and weights are divided to match."""
    from transformers import RwkvForCausalLM

    save_checkpoint(replace(weights, config=replace(weights.config, rescale_every=every)), folder, "hf", "fp32")
    return HfSession(RwkvForCausalLM.from_pretrained(str(folder)), weights.config, threads, "transformers")
