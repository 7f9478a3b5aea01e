"""Weights of which one layer at a time is upcast: localizing goes through a model layer by layer, several runs abreast.

A float32 copy of a whole model would be larger than all else that localizing holds, and converting each matrix again
for every run would take longer than the products.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from harness.budget import hold
from reference.config import count_parameters
from reference.weights import Tensor, Weights

#: Parameters up to which a copy of all is no matter.
_SMALL = 1 << 23


def layered(stored: Weights) -> Weights:
    """A scheme's weights ready to be read many times: a small model in memory, a large half precision one by layers.

    Its ends stay as they are stored, and are upcast a block of rows at a time. Weights that would have to be quantized
    again at every reading are held as :func:`harness.budget.hold` does.
    """
    small = count_parameters(stored.config) <= _SMALL
    if small or any(tensor.stored not in ("f16", "bf16") for tensor in stored.values() if len(tensor.shape) == 2):
        return hold(stored)
    present = _Present()
    return stored.map(lambda name, tensor: present.tensor(name, tensor) if name.startswith("blocks.") else tensor)


@dataclass
class _Present:
    """The layer that is being read, as far as it has been."""

    layer: str = ""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A float32 tensor that is read once while its layer is the present one."""
        layer = name.split(".")[1]

        def read() -> np.ndarray:
            if layer != self.layer:
                self.layer, self.arrays = layer, {}
            if name not in self.arrays:
                self.arrays[name] = np.ascontiguousarray(tensor.array(np.float32))
            return self.arrays[name]

        return Tensor("f32", tensor.shape, read)
