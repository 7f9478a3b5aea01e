"""The same function by other weights: powers of two moved from where values overflow to where they do not.

    ffn.key / 2^a,  ffn.value * 2^2a        relu(k)^2 is homogeneous of degree 2
    att.value / 2^a,  att.output * 2^a      WKV is a mean of v
    ln1, ln2, ln_out / 2^a, what reads them * 2^a
    ln0, every att.output and ffn.value / 2^a   the whole stream: LayerNorm does not see its scale, but for eps

Works on every backend, since only the checkpoint changes; att.k and logits are not to be had this way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from reference.config import Config
from reference.weights import Tensor, Weights

#: What is left between a value and the limit it is brought under.
MARGIN = 2.0

#: The whole stream and what is added to it.
_STREAM = ("blocks.0.ln0", "att.out", "att.residual", "ffn.v", "ffn.out", "ffn.residual")

_VALUE = ("att.v", "att.wkv", "att.rwkv")
_LN1 = ("ln1", "att.xk", "att.xv", "att.xr")
_LN2 = ("ln2", "ffn.xk", "ffn.xr")
_SQUARED = ("ffn.k", "ffn.k2")


@dataclass
class Rescaling:
    """Exponents of two by tensor name, and what was done in words."""

    exponents: dict[str, int] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def move(self, told: str, **tensors: int) -> None:
        """Add exponents; ``told`` says it."""
        self.told.append(told)
        for name, exponent in tensors.items():
            self.exponents[name] = self.exponents.get(name, 0) + exponent

    def apply(self, weights: Weights) -> Weights:
        """The rescaled model, its tensors of the types they were stored in."""
        return weights.map(lambda name, tensor: _scaled(tensor, self.exponents.get(name, 0)))


def rescaling(config: Config, excess: Mapping[str, float]) -> Rescaling | None:
    """What brings each trace point of ``excess`` (its largest value over the limit) under the limit.

    ``None`` where one of them cannot be reached by weights.
    """
    wanted: dict[tuple[int | None, str], int] = {}
    for point, ratio in excess.items():
        group = _group(point)
        if group is None or not math.isfinite(ratio):
            return None
        layer, name = group
        a = math.ceil(math.log2(ratio * MARGIN))
        if name == "ffn.key" and point.endswith("k2"):
            a = math.ceil(a / 2)
        wanted[group] = max(wanted.get((layer, name), 0), a)
    found = Rescaling()
    for (layer, name), a in wanted.items():
        _move(found, config, layer, name, a)
    return found


def _group(point: str) -> tuple[int | None, str] | None:
    """Layer and tensor by which a trace point is made smaller."""
    name = point.split(".", 2)[2] if point.startswith("blocks.") else point
    layer = int(point.split(".")[1]) if point.startswith("blocks.") else None
    if point == "blocks.0.ln0" or name in _STREAM:
        return None, "stream"
    if name == "ln_out":
        return None, "ln_out"
    by_tensor = {"att.value": _VALUE, "ln1": _LN1, "ln2": _LN2, "ffn.key": _SQUARED}
    return next(((layer, tensor) for tensor, names in by_tensor.items() if name in names), None)


def _move(found: Rescaling, config: Config, layer: int | None, name: str, a: int) -> None:
    at = f"blocks.{layer}."
    if name == "stream":
        names = ["blocks.0.ln0.weight", "blocks.0.ln0.bias"]
        names += [f"blocks.{i}.{m}.weight" for i in range(config.n_layer) for m in ("att.output", "ffn.value")]
        found.move(f"the residual stream / 2^{a}", **dict.fromkeys(names, -a))
    elif name == "ln_out":
        found.move(f"ln_out / 2^{a}, head * 2^{a}", **_norm("ln_out", a), **{"head.weight": a})
    elif name == "ffn.key":
        told = f"{at}ffn.key / 2^{a}, {at}ffn.value * 2^{2 * a}"
        found.move(told, **{f"{at}ffn.key.weight": -a, f"{at}ffn.value.weight": 2 * a})
    elif name == "att.value":
        told = f"{at}att.value / 2^{a}, {at}att.output * 2^{a}"
        found.move(told, **{f"{at}att.value.weight": -a, f"{at}att.output.weight": a})
    else:
        half, readers = ("att", ("key", "value", "receptance")) if name == "ln1" else ("ffn", ("key", "receptance"))
        told = f"{at}{name} / 2^{a}, {', '.join(readers)} * 2^{a}"
        found.move(told, **_norm(at + name, a), **{f"{at}{half}.{m}.weight": a for m in readers})


def _norm(name: str, a: int) -> dict[str, int]:
    return {f"{name}.weight": -a, f"{name}.bias": -a}


def _scaled(tensor: Tensor, exponent: int) -> Tensor:
    """``tensor * 2 ** exponent``, in its own type where that holds it exactly, else in float32."""
    if exponent == 0:
        return tensor
    scaled = np.ldexp(tensor.array(np.float32), exponent)
    if tensor.stored == "f16":
        with np.errstate(over="ignore"):
            half = scaled.astype(np.float16)
        if np.array_equal(half.astype(np.float32), scaled):
            return Tensor.of(half)
    return Tensor.of(scaled)


def describe(parts: Sequence[str], most: int = 3) -> str:
    """The first few of what was done, and how much more."""
    return "; ".join([*parts[:most], *([f"and {len(parts) - most} more"] if len(parts) > most else [])])
