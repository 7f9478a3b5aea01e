"""A backend that shows nothing but logits, over checkpoints of the first k layers: the smallest k that fails.

Where every checkpoint above some k fails, bisection finds it. An error may be small against what later layers add, so
that a pass lies above a fail: then k is counted up from 1. Which half of the last layer it is, is told by one more
checkpoint in which the other half does next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from backends.api import Unavailable, Unsupported
from harness.localize.case import Case, overflow
from harness.localize.finding import Seen
from harness.localize.state import ATT, FFN
from harness.parity import Gate, gate
from harness.tolerance import derive
from reference.config import tensor_shapes, with_layers
from reference.operations import FIRST, LAST
from reference.schemes import apply
from reference.weights import Tensor, Weights, find_non_finite

#: A half of a block is silenced by this factor rather than by zero, which some schemes cannot store.
SILENT = 2.0**-12

#: What is made small for it: what a half adds to the stream, and what would overflow before that.
_QUIET = {"att": ("att.output",), "ffn": ("ffn.key", "ffn.value")}

#: Layers below the one found that are tried too, and of what is finite 1: the next layers may hide an error.
_CONFIRMED = 2


@dataclass(frozen=True)
class Cut:
    """The smallest failing number of layers, and what is left of the span.

    half   ``att``, ``ffn``, ``ends`` (the embedding, the head and their norms), or empty where it is not known
    seen   every checkpoint that was tried, by its number of layers
    overflow  the trace point of that layer that overflows in the declared arithmetic, if one does
    """

    layers: int
    half: str
    seen: tuple[Seen, ...]
    overflow: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def span(self) -> list[str]:
        """Trace points that may be where it begins."""
        at = f"blocks.{self.layers - 1}."
        half = {"att": ["ln1", *ATT], "ffn": ["ln2", *FFN], "ends": []}.get(self.half, ["ln1", *ATT, "ln2", *FFN])
        ends = self.layers == 1 and self.half in ("", "ends")
        return [*(FIRST if ends else ()), *(at + name for name in half), *(LAST if ends else ())]


def first_layers(weights: Weights, n: int) -> Weights:
    """The same model cut to its first ``n`` layers."""
    if n == weights.config.n_layer:
        return weights
    config = with_layers(weights.config, n)
    tensors = {name: weights[name] for name in tensor_shapes(config)}
    return replace(weights, config=config, tensors=tensors, key="", source=f"{weights.source}, {n} layers")


def silenced(weights: Weights, half: str) -> Weights:
    """One half of the last block adds next to nothing to the stream, and squares nothing large."""
    at = f"blocks.{weights.config.n_layer - 1}."
    names = {f"{at}{name}.weight" for name in _QUIET[half]}

    def quiet(name: str, tensor: Tensor) -> Tensor:
        if name not in names:
            return tensor
        return Tensor("f32", tensor.shape, lambda: tensor.array(np.float32) * np.float32(SILENT))

    return weights.map(quiet)


def smallest(case: Case, judged: Gate) -> Cut:
    """Cut the model; ``judged`` is the whole one, which fails. Raises Unsupported where it cannot be cut."""
    tried: dict[int, Gate] = {case.weights.config.n_layer: judged}

    def cut_fails(n: int) -> bool:
        if n not in tried:
            case.tell(f"the first {n} of {case.weights.config.n_layer} layers")
            tried[n] = _judged(case, first_layers(case.weights, n))
        return not tried[n].passed

    low, high = 0, case.weights.config.n_layer
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cut_fails(middle) else (middle, high)
    below = [*range(high - 1, max(0, high - 1 - _CONFIRMED), -1)]
    finite = _finite(judged)
    failing = [n for n in dict.fromkeys([*below, *([1] if finite and high > 1 else [])]) if cut_fails(n)]
    notes = []
    if failing:
        passes, high = high - 1, next(n for n in range(1, high) if cut_fails(n)) if finite else failing[-1]
        counted = f"; counted up from 1, {high} is the first" if finite else ""
        notes.append(f"{passes} layers pass and {failing[0]} fail: the next layer hides the error{counted}")
    cut = first_layers(case.weights, high)
    seen = tuple(_seen(n, tried[n]) for n in sorted(tried))
    found = Cut(high, "", seen, notes=tuple(notes))
    broken = any(one.problem in ("NaN", "Inf") for one in seen if one.point == f"layers {high}")
    known = overflow(case, found.span) if broken else None
    if known is not None:
        return replace(found, overflow=known)
    half, why = _half(case, cut, broken)
    return replace(found, half=half, notes=(*notes, *why))


def _finite(judged: Gate) -> bool:
    """Whether what fails is an error: NaN and Inf, once there, stay in deeper models."""
    return not any((check.problem or "").startswith(("NaN", "Inf")) for check in judged.logits)


def fails(case: Case, weights: Weights) -> bool:
    """Whether the backend fails over other weights. Raises what opening it raises, ValueError for what has no scale."""
    if find_non_finite(apply(weights, case.scheme)):
        raise ValueError(f"{case.scheme} cannot store a layer that does next to nothing")
    return not _judged(case, weights).passed


def _half(case: Case, cut: Weights, broken: bool) -> tuple[str, list[str]]:
    """Which half of the last layer it is, if silencing one tells; a NaN (``broken``) is not made smaller by it."""
    case.tell("which half of the layer")
    try:
        wrong = {name: fails(case, silenced(cut, other)) for name, other in (("att", "ffn"), ("ffn", "att"))}
    except (Unavailable, Unsupported, ValueError) as error:
        return "", [f"the halves of the layer could not be told apart: {error}"]
    if wrong["att"] != wrong["ffn"]:
        return ("att" if wrong["att"] else "ffn"), []
    if not wrong["att"]:
        return "", ["with either half of the layer silenced it passes: only both together fail"]
    if cut.config.n_layer > 1 or broken:
        return "", ["with either half of the layer silenced it fails"]
    if not fails(case, silenced(silenced(cut, "att"), "ffn")):
        return "", ["with either half of the layer silenced it fails, with both it passes: it is in both halves"]
    return "ends", [
        "with both halves of the first layer silenced it fails: it is outside of the layers, or in the residual "
        "stream through them"
    ]


def _judged(case: Case, weights: Weights) -> Gate:
    truth = derive(weights, case.scheme, case.arithmetic, case.tokens)
    with case.opener(weights) as session:
        return gate(session, truth)


def _seen(n: int, judged: Gate) -> Seen:
    shown = judged.first_bad or max(judged.logits, key=lambda check: check.ratio)
    point, problem = f"layers {n}", shown.problem or ""
    if problem:
        return Seen(point, n - 1, None, None, None, None, problem.split(" ")[0])
    return Seen(point, n - 1, None, None, shown.error, shown.bound)
