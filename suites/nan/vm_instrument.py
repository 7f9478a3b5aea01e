"""The plain instrument on a TVM library: NaN and Inf per kernel, as MLC-LLM's ``dump_intermediate`` counts them.

    PYTHONPATH=ROOT TVM_ENVIRONMENT/bin/python suites/nan/vm_instrument.py MODEL SCHEME TOKENS

Prints one JSON line: every kernel in the order of its calls, with how much of its output is not finite. It knows
nothing of RWKV-4: what a kernel is, and of which layer, is for the reader to guess from its name.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from backends.tvm_mlc import library, load
from backends.tvm_mlc.session import TvmSession
from reference.checkpoint import load_checkpoint


def counted(model: str, scheme: str, tokens: list[int]) -> list[dict[str, Any]]:
    """``{"kernel", "nan", "inf"}`` for every kernel of one prefill of the library compiled for ``model``."""
    session = load(load_checkpoint(model), scheme, "cpu", 1)
    assert isinstance(session, TvmSession)
    found: list[dict[str, Any]] = []

    def look(function: Any, name: str, before: bool, value: Any, *arguments: Any) -> int:
        tensors = [a for a in arguments if isinstance(a, library.runtime().runtime.Tensor)]
        if not before and tensors:
            out = tensors[-1].numpy()
            if out.dtype.kind == "f":
                found.append({"kernel": name, "nan": int(np.isnan(out).sum()), "inf": int(np.isinf(out).sum())})
        return 0

    session._library.vm.set_instrument(look)
    session.forward(tokens, None)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(counted(sys.argv[1], sys.argv[2], [int(t) for t in sys.argv[3].split(",")])) + "\n")
