"""How MLC-LLM's schemes keep each tensor, and the parameters of a library in the order in which it takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from reference.codecs_mlc import MlcGroups
from reference.config import Config, tensor_shapes
from reference.hf_folder import hf_name
from reference.mlc_params import mlc_arrays
from reference.schemes import Packed, codec_of
from reference.weights import Weights


@dataclass(frozen=True)
class Kept:
    """One tensor as it is stored.

    dtype   numpy's name of the type of its values, or of its scales where it is quantized
    bits    0 where it is not quantized
    group   weights of a row that share a scale
    layout  ``NK``: rows are outputs, as in the checkpoint; ``KN``: transposed
    """

    dtype: str
    bits: int = 0
    group: int = 0
    layout: str = "NK"

    @property
    def per_word(self) -> int:
        """Codes in one uint32."""
        return 32 // self.bits

    @property
    def zero(self) -> int:
        """The code of zero."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def words_per_group(self) -> int:
        """Words of uint32 that share a scale."""
        return self.group // self.per_word

    def groups(self, k: int) -> int:
        """Groups in a row of ``k`` weights."""
        return -(-k // self.group)

    def words(self, k: int) -> int:
        """Words of uint32 in a row of ``k`` weights."""
        return self.groups(k) * self.words_per_group


@dataclass(frozen=True)
class Parameter:
    """One array that a library takes: which part of which tensor, and its form."""

    tensor: str
    part: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> str:
        """``blocks.0.att.key.q_weight`` or the tensor's own name."""
        return self.tensor if not self.part else f"{self.tensor.rsplit('.', 1)[0]}.{self.part}"

    @property
    def name(self) -> str:
        """MLC-LLM's name, that of the Hugging Face checkpoint: ``rwkv.blocks.0.attention.key.q_weight``."""
        stem = hf_name(self.tensor)
        return stem if not self.part else f"{stem.rsplit('.', 1)[0]}.{self.part}"


def model_dtype(scheme: str) -> str:
    """Type of the activations between kernels: ``float32`` or ``float16``, as the scheme's name says."""
    return "float16" if "f16" in scheme else "float32"


def kept(name: str, scheme: str) -> Kept:
    """How ``scheme``, one of MLC's, keeps the tensor of a canonical name."""
    form = codec_of(scheme).format(name)
    if isinstance(form, Packed) and isinstance(form.packing, MlcGroups):
        packing = form.packing
        return Kept(np.dtype(packing.model_type).name, packing.bits, packing.group, packing.layout)
    if name.endswith((".time_decay", ".time_first")):
        return Kept("float32")
    return Kept(model_dtype(scheme))


def parameters(config: Config, scheme: str) -> list[Parameter]:
    """What a library of this shape and scheme takes, in MLC-LLM's order, codes before scales.

    The order is that in which ``mlc_llm/relax_model/rwkv.py`` of 2023-07 to 2024-03 sets up its modules.
    """
    found: list[Parameter] = []
    shapes = tensor_shapes(config)
    for name in sorted(shapes, key=_place):
        shape = shapes[name]
        how = kept(name, scheme)
        if not how.bits:
            found.append(Parameter(name, "", _turned(shape, how), how.dtype))
            continue
        n, k = shape
        found.append(Parameter(name, "q_weight", _turned((n, how.words(k)), how), "uint32"))
        found.append(Parameter(name, "q_scale", _turned((n, how.groups(k)), how), how.dtype))
    return found


def arrays(weights: Weights, scheme: str, rescale_every: int = 0) -> Iterator[tuple[Parameter, np.ndarray]]:
    """The parameters of a checkpoint, one tensor at a time.

    ``time_decay`` is stored as ``-exp(time_decay)``. With ``rescale_every``, ``att.output`` and ``ffn.value`` of
    layer i are divided by ``2 ** (i // rescale_every)``, or the scales of their groups.
    """
    for name, items in groupby(parameters(weights.config, scheme), lambda item: item.tensor):
        found = mlc_arrays(name, weights[name], scheme)
        for item in items:
            array = found[item.key]
            if name.endswith(".time_decay"):
                array = -np.exp(array)
            if item.part != "q_weight" and halvings(name, rescale_every):
                array = array / array.dtype.type(2.0 ** halvings(name, rescale_every))
            if array.shape != item.shape or array.dtype != item.dtype:
                raise ValueError(f"{item.key} is {array.dtype} {array.shape}, not {item.dtype} {item.shape}")
            yield item, np.ascontiguousarray(array)


def halvings(name: str, rescale_every: int) -> int:
    """How often the residual stream has been halved before the layer that a matrix writes to it from."""
    if not rescale_every or not name.endswith(("att.output.weight", "ffn.value.weight")):
        return 0
    return int(name.split(".")[1]) // rescale_every


#: Modules of a layer in MLC-LLM's order; inside one, the order is the checkpoint's.
_MODULES = ("ln0", "ln1", "ln2", "att", "ffn")


def _place(name: str) -> tuple[int, int, int]:
    """Where a tensor comes in MLC-LLM's order: before the layers, or in which, or after; and in which module."""
    if not name.startswith("blocks."):
        return (("emb.weight", "", "ln_out.weight", "ln_out.bias", "head.weight").index(name), 0, 0)
    _, layer, module, *_ = name.split(".")
    return 1, int(layer), _MODULES.index(module)


def _turned(shape: tuple[int, ...], how: Kept) -> tuple[int, ...]:
    return shape[::-1] if how.layout == "KN" else shape
