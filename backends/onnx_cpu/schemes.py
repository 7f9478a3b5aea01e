"""What is kept and how it is computed with, by scheme name.

    exact     accuracy_level 0: MatMulNBits dequantizes to float32 and multiplies float32 activations
    int8act   accuracy_level 4: it rounds activations to int8 as well, in the blocks of the weights, and multiplies
              integers; sums of blocks are float32

At accuracy_level 0 the operator dequantizes a whole matrix of 8 bits at every token, which at 169M gave 12 tokens per
second. So exact 8 bits run as two products of 4 bits, 16 times the upper halves of the codes and the lower halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

from reference.codecs_onnx import ONNX_SCHEMES, OnnxBlocks, OnnxScheme
from reference.config import is_matrix
from reference.errors import ConfigError
from reference.numerics import Arithmetic

EXACT, INT8 = 0, 4


@dataclass(frozen=True)
class Kept:
    """How a scheme's matrices are kept, and the operator that multiplies with them.

    scheme    ``None``: float32, in MatMul
    accuracy  MatMulNBits' accuracy_level
    """

    scheme: Optional[OnnxScheme]  # noqa: UP045 - evaluated at run time, on Python 3.9 too
    accuracy: int = EXACT

    def blocks(self, name: str) -> OnnxBlocks | None:
        """How a matrix is kept; ``None``: float32."""
        if self.scheme is None:
            return None
        return self.scheme.blocks(name)

    def halved(self, blocks: OnnxBlocks) -> bool:
        """Whether a matrix kept so is two of 4 bits to the operator."""
        return self.accuracy == EXACT and blocks.bits == 8

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises :class:`ConfigError` where groups do not divide the rows of a model's tensors."""
        for name, shape in shapes.items():
            blocks = self.blocks(name) if is_matrix(name) and name != "emb.weight" else None
            if blocks is not None and shape[-1] % blocks.group:
                raise ConfigError(
                    f"tensor {name} has rows of {shape[-1]} weights, which do not divide into groups of "
                    f"{blocks.group}; choose a scheme of smaller groups, or fp32"
                )

    @property
    def arithmetic(self) -> Arithmetic:
        """Sums run in 16 lanes or more of float32, so that the longest chain is n_ffn / 16; blocks are shorter."""
        if self.scheme is None or self.accuracy == EXACT:
            return Arithmetic()
        # MLAS' QuantizeARow_CompInt8: float32 scales of max|x| / 127, to nearest even, in the weights' blocks.
        return Arithmetic(activations={32: "int8x32f", 128: "int8x128"}[self.scheme.matrices.group])


SCHEMES = {
    "fp32": Kept(None),
    **{name: Kept(kept, INT8 if name.endswith("_int8act") else EXACT) for name, kept in ONNX_SCHEMES.items()},
}
