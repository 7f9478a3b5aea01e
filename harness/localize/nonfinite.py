"""Where NaN and Inf come from: what overflows, by how much, and which elements that predicts.

Each candidate predicts which elements of the result are not finite; the one that predicts what the backend shows is the
cause, and how well it does is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from harness.compare import first_non_finite
from harness.localize.decoder import Decoder
from harness.localize.describe import channels_in_words, tokens_in_words
from harness.localize.evidence import Evidence
from harness.localize.hypotheses_products import GATES, PRODUCTS
from harness.localize.limits import FP16, LIMITS, kind_of, kind_within
from harness.localize.match import Place, matches, place
from harness.localize.nonfinite_wkv import Candidate, beyond, over, sums
from harness.localize.whatif import harmful
from harness.localize.whole import Model
from reference.numerics import Arithmetic
from reference.operations import Step, steps
from reference.weights import Weights, find_non_finite

#: A candidate that predicts fewer than this share of what it and the backend have together is not named.
_AGREEMENT = 0.5


def non_finite(evidence: Evidence) -> str:
    """The cause of a value that is not finite; empty where all that is shown is finite."""
    shown = [x for x in (evidence.got, evidence.logits, evidence.state) if x is not None]
    if not any(first_non_finite(x) for x in shown):
        return ""
    weights = _of_weights(evidence)
    if weights or evidence.got is None:
        return weights or _of_model(evidence)
    found = place(evidence)
    if found is None or found.got.shape != found.right.shape or _reproduced(found, evidence):
        return ""
    return _of_operation(found)


def _reproduced(found: Place, evidence: Evidence) -> bool:
    """Whether a wrong computation gives the same NaN and Inf, and the same values besides."""
    return bool(matches(found, Decoder(evidence.original, found.weights, evidence.scheme)))


def _of_weights(evidence: Evidence) -> str:
    """A weight that is not finite, in the checkpoint or once stored, where the fault's operation reads it."""
    for weights, words in (
        (evidence.original, "the checkpoint holds {} in"),
        (evidence.stored, "stored by {scheme} the weights have {} in"),
    ):
        names = [name for name in weights if evidence.layer is None or name.startswith(f"blocks.{evidence.layer}.")]
        bad = find_non_finite({name: weights[name] for name in names})
        if bad:
            problem, index = first_non_finite(weights[bad[0]].array()) or ("NaN", ())
            largest = float(np.abs(evidence.original[bad[0]].array(np.float64)).max())
            beyond = f"; its largest weight is {largest:.3g}" if np.isfinite(largest) else ""
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            start = words.format(problem, scheme=evidence.scheme)
            return f"{start} {bad[0]} at {list(index)}{more}{beyond}: no backend can give anything finite"
    return ""


def _of_operation(found: Place) -> str:
    got = found.got
    problem, (token, channel) = first_non_finite(got) or ("NaN", (0, 0))
    start = f"{found.step.point} is {problem} at token {token}, channel {channel} ({_places(got, found.right)})"
    given = _given(found)
    if given:
        return f"{start}: {given}"
    if not np.isfinite(found.right).all():
        return f"{start}: so it is in float64 from what the backend was given"
    candidates = [c for c in _candidates(found) if c.mask.any()]
    judged = [(_agreement(c.mask, got), c) for c in candidates]
    best = max((a for a, _ in judged), default=0.0)
    named = [(a, c) for a, c in judged if a >= max(_AGREEMENT, 0.95 * best)]
    if not named:
        return f"{start}: {_unexplained(found, token, channel)}"
    return f"{start}: " + "; or ".join(f"{c.text} ({_predicts(c.mask, got)})" for _, c in named[:3])


def _places(got: np.ndarray, right: np.ndarray) -> str:
    """How many are not finite, and which, where that is soon said."""
    bad = ~np.isfinite(got)
    many = f"{int(bad.sum())} of {bad.size} elements"
    tokens, channels = np.flatnonzero(bad.any(axis=1)), np.flatnonzero(bad.any(axis=0))
    for mask, which in ((right < 0, "negative"), (right > 0, "positive"), (right == 0, "zero")):
        if np.array_equal(bad, mask) and not bad.all():
            return f"{many}: exactly those whose right value is {which}"
    if bad[np.ix_(tokens, channels)].all() and 1 < bad.sum() < bad.size:
        words = [tokens_in_words(tokens, bad.shape[0])] if tokens.size < bad.shape[0] else []
        words += [channels_in_words(channels, bad.shape[1])] if channels.size < bad.shape[1] else []
        return f"{many}: all of them {' and '.join(words)}"
    return many


def _given(found: Place) -> str:
    """An input that is not finite already."""
    for name, value in found.known.items():
        bad = first_non_finite(value)
        if bad and name in found.step.operation.inputs:
            return f"it was given {bad[0]}: {name} at token {bad[1][0]}, channel {bad[1][1]}"
    return ""


def _agreement(mask: np.ndarray, got: np.ndarray) -> float:
    """Elements both predicted and seen over those either predicted or seen."""
    seen = ~np.isfinite(got)
    return float((mask & seen).sum() / max(1, (mask | seen).sum()))


def _predicts(mask: np.ndarray, got: np.ndarray) -> str:
    seen = ~np.isfinite(got)
    hits, extra = int((mask & seen).sum()), int((mask & ~seen).sum())
    return f"predicts {hits} of {int(seen.sum())} of them{f' and {extra} others' if extra else ', no others'}"


def _unexplained(found: Place, token: int, channel: int) -> str:
    value, limit = found.right[token, channel], LIMITS[kind_of(found.arithmetic, found.step.name)]
    return (
        f"the right value there is {value:.3g}, {abs(value) / limit:.1e} of the limit {limit:.5g}, and nothing on the "
        "way to it overflows: an uninitialised buffer, a read out of bounds, or 0/0 in an approximation"
    )


def _candidates(found: Place) -> Iterator[Candidate]:
    """Every overflow that might be it, the declared arithmetic's first, then fp16 where it is not declared."""
    name, right = found.step.name, np.abs(found.right)
    declared, within = kind_of(found.arithmetic, name), kind_within(found.arithmetic, name)
    for kind in dict.fromkeys([declared, FP16]):
        limit, said = LIMITS[kind], _said(kind, declared)
        yield Candidate(over("the result itself overflows", right, limit, said), right > limit)
    for kind in dict.fromkeys([within, FP16]):
        yield from _within(found, kind, _said(kind, within))
    if name in PRODUCTS:
        yield from _sums(found)


def _said(kind: str, declared: str) -> str:
    return kind if kind == declared else f"{kind}, which is not what is declared"


def _within(found: Place, kind: str, said: str) -> Iterator[Candidate]:
    """What overflows inside of an operation whose result would fit."""
    name, limit, part = found.step.name, LIMITS[kind], found.part_right()
    everywhere = np.ones(found.right.shape, dtype=bool)
    if name == "ffn.k2":
        k = np.maximum(part("ffn.k"), 0)
        text = over("the square of relu(k) overflows", np.square(k), limit, said)
        yield Candidate(
            f"{text}; it does from k = {limit**0.5:.4g} on, and k reaches {k.max():.4g}", np.square(k) > limit
        )
    if name in ("ln1", "ln2", "ln_out", "blocks.0.ln0"):
        x = part(found.step.operation.inputs[0])
        squares = np.square(x - x.mean(axis=-1, keepdims=True))
        summed = squares.sum(axis=-1, keepdims=True)
        text = over("the sum of squares of the LayerNorm overflows", summed, limit, said)
        yield Candidate(text, everywhere & (summed > limit))
        text = over("a square within the LayerNorm overflows", squares, limit, said)
        yield Candidate(text, everywhere & (squares > limit).any(axis=-1, keepdims=True))
        still = squares.max(axis=-1, keepdims=True) == 0
        yield Candidate("0/0: all channels are equal, and the LayerNorm has no eps", everywhere & still)
    if name in GATES:
        x = -np.log(1 / np.clip(found.right, 1e-300, 1 - 1e-16) - 1)
        top = float(np.log(limit))
        text = f"e^x overflows {said} from {top:.4g} on, and e^x / (1 + e^x) is Inf/Inf; x reaches {x.max():.4g}"
        yield Candidate(text, x > top)
    if name == "att.wkv":
        yield from beyond(found, kind, said)


def _sums(found: Place) -> Iterator[Candidate]:
    """Partial sums of a product beyond fp16 where the result is not: one for the natural order, one for any."""
    source, matrix = PRODUCTS[found.step.name]
    x, weight = found.part_right()(source), found.weights[found.step.at + matrix].array(np.float64)
    limit, declared = LIMITS[FP16], found.arithmetic.accumulation
    said = FP16 if declared == FP16 else f"fp16, where {declared} is declared"
    largest, mask = np.zeros(found.got.shape), np.zeros(found.got.shape, dtype=bool)
    single = np.zeros(found.got.shape)
    for token in range(len(x)):
        products = weight * x[token]
        partial = np.abs(np.cumsum(products, axis=1)).max(axis=1)
        largest[token], mask[token] = partial, partial > limit
        single[token] = np.abs(products).max(axis=1)
    yield Candidate(over("a partial sum of the product overflows", largest, limit, said), mask)
    yield Candidate(over("a single product overflows", single, limit, said), single > limit)


def _of_model(evidence: Evidence) -> str:
    """Nothing shown but the end: what truth's magnitudes say would overflow first."""
    model = Model(evidence.stored, evidence.tokens)
    layers: Sequence[int] = range(evidence.stored.config.n_layer) if evidence.layer is None else [evidence.layer]
    found = []
    for layer in (*layers, *([None] if evidence.layer is None else [])):
        found += list(_beyond(model.results(layer), layer, evidence.arithmetic, evidence.stored))
        if found:
            break
    if found:
        return f"{found[0]}{'; after it also ' + ', '.join(found[1:3]) if found[1:] else ''}"
    where = "" if evidence.layer is None else f" in layer {evidence.layer}"
    return f"nothing{where} comes near the limits of the declared {evidence.arithmetic}: {_fp16_words(model, layers)}"


def _beyond(
    results: dict[str, np.ndarray], layer: int | None, arithmetic: Arithmetic, weights: Weights
) -> Iterator[str]:
    order = [step for step in steps(weights.config) if step.layer == layer]
    for step in order:
        if step.name not in results:
            continue
        if step.name == "att.wkv":
            yield from _sums_beyond(results, step, arithmetic, weights)
        kind = kind_of(arithmetic, step.name)
        sizes = np.abs(harmful(step.point, results[step.name]))
        top, limit = float(sizes.max()), LIMITS[kind]
        if top > limit:
            token, channel = np.argwhere(sizes > limit)[0]
            times = f"{top / limit:.2f} times the largest {kind} ({limit:.5g})"
            where = f"first at token {token}, channel {channel}"
            yield f"{step.point} overflows: truth has {top:.4g} there, {times}, {where}"


def _sums_beyond(results: dict[str, np.ndarray], step: Step, arithmetic: Arithmetic, weights: Weights) -> Iterator[str]:
    """The sums of WKV, whose means may fit where they do not."""
    kind = kind_within(arithmetic, step.name)
    w = np.exp(weights[step.at + "att.time_decay"].array(np.float64))
    u = weights[step.at + "att.time_first"].array(np.float64)
    made = sums(results["att.k"], results["att.v"], w, u)
    for name in ("aa", "bb"):
        if not made[name].max() <= LIMITS[kind]:
            yield over(f"the sum {name} of {step.point} overflows", made[name], LIMITS[kind], kind)


def _fp16_words(model: Model, layers: Sequence[int]) -> str:
    """The largest result, against fp16, in case it is used where it is not declared."""
    top, name = max(
        (float(np.abs(value).max()), f"blocks.{layer}.{name}")
        for layer in layers
        for name, value in model.results(layer).items()
        if name != "x"
    )
    limit, reach = LIMITS[FP16], "no overflow even in fp16"
    if top > limit:
        reach = f"{top / limit:.2f} times the largest fp16: an overflow if fp16 is used there"
    rest = "a read out of bounds, an uninitialised buffer or exponentials without the max trick remain"
    return f"the largest value is {top:.4g} in {name}, {reach}; {rest}"
