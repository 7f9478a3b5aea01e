"""What the forward pass needs of torch's MPS device, asked before it runs, so that nothing falls back to the CPU.

Which operators MPS has is published in ``native_functions.yaml``, which torch brings in its package torchgen: those
with a kernel of the key MPS, and composite ones, which are made of others. suites/selftest/test_mps.py records what
the session runs on a CPU and holds :data:`OPERATORS` against both.
"""

from __future__ import annotations

import torch

from backends.api import Unsupported

#: What is dispatched in load, forward, trace, greedy and the state's import and export, composites taken apart.
_NAMES = (
    "_local_scalar_dense _to_copy add.Tensor addcmul addcmul_ argmax cat clone copy_ detach div.Tensor "
    "embedding empty.memory_format exp exp_ expand fill_.Scalar full index.Tensor index_select lerp.Tensor "
    "lift_fresh maximum maximum.out mm mul.Tensor native_layer_norm pow.Tensor_Scalar pow_.Scalar relu relu_ "
    "select.int sigmoid sigmoid_ slice.Tensor stack sub.Tensor t unbind.int unsqueeze view.dtype zero_ zeros"
)
OPERATORS = tuple(f"aten::{name}" for name in _NAMES.split())

#: Keys by which an operator runs on MPS: its own kernel, or one made of others.
KEYS = ("MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd")


def lacking(operators: tuple[str, ...] = OPERATORS) -> list[str]:
    """Those that this torch has no MPS kernel for, nor makes of others."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in operators if not any(has(name, key) for key in KEYS)]


def check_operators(scheme: str) -> None:
    """Raise Unsupported where torch or the system lacks on MPS what a scheme needs."""
    missing = lacking()
    if missing:
        raise Unsupported(
            f"torch {torch.__version__} lacks {', '.join(missing[:3])} on MPS, and nothing may run on the CPU instead"
        )
    if scheme == "bf16" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise Unsupported("bf16 on MPS needs macOS 14 or newer; fp16 and fp32 run on older ones")
