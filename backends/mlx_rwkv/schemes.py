"""What is kept and how it is computed with, by scheme name.

On a CPU ``quantized_matmul`` adds up in the type of its inputs, in one accumulator a row: in fp16 its error is 0.9 %
of the result at rows of 4096, in bf16 7 %. So quantized weights are computed with in float32 there, scales and
biases upcast, which is exact; on Apple GPUs activations are fp16 and sums float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reference.codecs_mlx import MLX_SCHEMES, MlxGroups
from reference.numerics import Arithmetic

#: One accumulator a row, so the longest chain of RWKV-4 is n_ffn: 3072 for 169M, 4096 for 430M, 8192 for 1.5B.
_CPU_CHAIN = 4096

_HALF = Arithmetic(activations="fp16", residual="fp16")
_CPU = Arithmetic(chain=_CPU_CHAIN)


@dataclass(frozen=True)
class Kept:
    """How a scheme is kept and computed with.

    floats  scheme of the tensors that are not quantized
    groups  of the matrices; ``None``: none are
    cpu, metal  arithmetic, and by ``activations`` the type computed in
    """

    floats: str
    groups: MlxGroups | None
    cpu: Arithmetic
    metal: Arithmetic

    def arithmetic(self, device: str) -> Arithmetic:
        """On ``cpu`` or ``mps``."""
        return self.cpu if device == "cpu" else self.metal


SCHEMES: Mapping[str, Kept] = {
    "fp16": Kept("fp16", None, _HALF, _HALF),
    "bf16": Kept("bf16", None, *2 * (Arithmetic(activations="bf16", residual="bf16"),)),
    "fp32": Kept("fp32", None, _CPU, Arithmetic()),
    **{name: Kept("fp16", groups, _CPU, _HALF) for name, groups in MLX_SCHEMES.items()},
}
