"""The smallest change that restores parity: chosen by emulation, applied to the backend itself, judged again.

In the order of what they cost:

    float32 for the fewest operations, or a stream that is halved on its way   the backend's own ``adjust``
    powers of two moved between the checkpoint's tensors                       any backend
    another scheme that the backend offers                                     nearest in bytes first

The first that passes the gate on the real backend is the answer. Where the gate had passed before, what was wrong must
be gone from a trace too. One that only emulation has seen is told as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from backends.api import Unsupported
from harness.localize.bench import Bench
from harness.localize.evidence import Evidence, Opener
from harness.localize.finding import CLEAN, NON_FINITE, Finding, Fix
from harness.localize.held import from_backend, told
from harness.localize.magnitudes import Peak, measure
from harness.localize.rescaled import describe, rescaling
from harness.localize.tried import ENDS, Change, how_surely, try_change, why_not
from harness.localize.whatif import emulate, excess, layer_ranges, mixed, patterns, smallest_set
from reference.mixed import Mixed
from reference.numerics import Arithmetic
from reference.schemes import apply, stored_bytes

Tell = Callable[[str], None]

#: ``rescale_every`` that is tried: as ChatRWKV has it, and less.
RESCALES = (6, 4, 3, 2, 1)

#: Real sessions that are opened and judged before the search ends.
_MOST_TRIED = 5


@dataclass(frozen=True)
class Search:
    """What the search for a fix came to.

    fix    ``None`` where nothing was wrong or nothing helped
    none   in words, that none was found and what was tried; empty where there is a fix or nothing was wrong
    tries  what became of each try where none was found
    """

    fix: Fix | None = None
    none: str = ""
    tries: tuple[str, ...] = ()


def find_fix(
    finding: Finding,
    evidence: Evidence,
    opener: Opener | Bench,
    tell: Tell = lambda text: None,
    passed: bool = False,
) -> Search:
    """Try changes until one restores parity.

    opener  a :class:`Bench` can be opened with another scheme or arithmetic and is timed; any other only over another
            checkpoint
    passed  whether the gate passes without any change, so that its passing proves nothing
    """
    if finding.verdict == CLEAN or evidence.stored.non_finite or evidence.original.non_finite:
        return Search()
    seen: Fix | None = None
    tried: list[str] = []
    notes: list[str] = []
    for change in islice(changes(finding, evidence, opener, tell), _MOST_TRIED):
        tried.append(change.what)
        try:
            if change.change and not (isinstance(opener, Bench) and opener.adjustable):
                raise Unsupported("the backend's arithmetic cannot be changed from here")
            tell(f"trying {change.what}")
            done = try_change(change, evidence, opener, tell, finding if passed else None)
        except Exception as error:
            if not (isinstance(error, ENDS) or from_backend(error)):
                raise
            notes.append(f"{change.what}: {error if isinstance(error, ENDS) else told(error)}")
            if seen is None and change.confirmed is not None and change.confirmed.finite:
                seen = Fix(change.what, False)
            continue
        if done.judged.passed and done.gone:
            return Search(Fix(change.what, True, done.spent, "; ".join([*notes, *how_surely(done.truth)])))
        notes.append(f"{change.what}: {why_not(done)}")
        if done.gone is None and seen is None and change.confirmed is not None and change.confirmed.finite:
            seen = Fix(change.what, False)
    if seen is not None:
        return Search(replace(seen, note="only emulated; " + "; ".join(notes)))
    return Search(None, f"none found; tried: {'; '.join(tried)}" if tried else _nothing_to_try(opener), tuple(notes))


def _nothing_to_try(opener: Opener | Bench) -> str:
    """What the backend would need for a fix to be tried."""
    if not isinstance(opener, Bench):
        return "nothing to try: nothing overflows, and the backend can be opened over other weights only"
    more = len(opener.schemes) > 1
    schemes = "no other scheme of the backend holds the values" if more else "the backend has one scheme"
    adjusted = "no operation to adjust is known" if opener.adjustable else "cannot be adjusted"
    return f"nothing to try: {schemes} and {adjusted}"


def changes(finding: Finding, evidence: Evidence, opener: Opener | Bench, tell: Tell) -> Iterator[Change]:
    """What may help, cheapest first; nothing that emulation already sees fail."""
    usual, config = evidence.arithmetic, evidence.stored.config
    tell("measuring magnitudes")
    peaks = measure(evidence.stored, evidence.tokens, inner="fp32" not in (usual.accumulation, usual.wkv))
    over = excess(peaks, usual, config)
    if over:
        yield from _against_overflow(evidence, usual, peaks, opener, tell)
    elif isinstance(opener, Bench) and opener.adjustable and finding.point is not None and finding.point in peaks:
        kept = mixed(usual, [finding.point])
        yield Change(f"{finding.point} in fp32", kept, {"fp32": [finding.point]})
    yield from _rescaled(evidence, over or _suspected(finding, peaks))
    if isinstance(opener, Bench):
        yield from _other_schemes(evidence, opener, peaks)


def _against_overflow(
    evidence: Evidence, usual: Arithmetic, peaks: Mapping[str, Peak], opener: Opener | Bench, tell: Tell
) -> Iterator[Change]:
    """For a backend with ``adjust``, or in emulation alone: the smallest set in fp32, and rescaling where it helps."""
    stored, tokens = evidence.stored, evidence.tokens
    plain = dict(excess(peaks, usual, stored.config))
    left = {n: excess(peaks, Mixed(usual, (), n), stored.config) for n in RESCALES}
    every = min(RESCALES, key=lambda n: len(left[n]))  # of equals the largest: it rounds least
    halved = left[every]
    options = [0, *([every] if set(halved) < set(plain) else [])]
    for n in sorted(options, reverse=not halved):  # halving alone is cheaper than float32 anywhere
        keep, outcome = smallest_set(stored, tokens, usual, peaks, n, tell)
        if not outcome.finite:
            continue
        listed = list(patterns(keep, stored.config.n_layer))
        change: dict[str, Any] = {"fp32": listed} if listed else {}
        if n:
            change["rescale_every"] = n
        yield Change(named(listed, n), mixed(usual, listed, n), change, confirmed=outcome)


def named(listed: list[str], rescale_every: int) -> str:
    """``ffn.k2 of layer 3 in fp32, rescale_every 6``."""
    layers: dict[str, list[int]] = {}
    for pattern in listed:
        parts = pattern.split(".", 2)
        layers.setdefault(parts[-1] if len(parts) == 3 else pattern, [])
        if len(parts) == 3 and parts[1].isdigit():
            layers[parts[2]].append(int(parts[1]))
    by_layers: dict[str, list[str]] = {}
    for name, at in layers.items():
        plural = "s" if len(at) > 1 else ""
        everywhere = " of every layer" if f"blocks.*.{name}" in listed else ""
        by_layers.setdefault(f" of layer{plural} {layer_ranges(at)}" if at else everywhere, []).append(name)
    words = [", ".join(names) + where for where, names in by_layers.items()]
    told = [f"{describe(words, 4)} in fp32"] if words else []
    return ", ".join([*told, *([f"rescale_every {rescale_every}"] if rescale_every else [])])


def _suspected(finding: Finding, peaks: Mapping[str, Peak]) -> dict[str, float]:
    """Where the declared arithmetic does not overflow but the backend does: what brings that point far down."""
    if finding.verdict != NON_FINITE or finding.point is None or finding.point not in peaks:
        return {}
    return {finding.point: 2.0**4}


def _rescaled(evidence: Evidence, over: Mapping[str, float]) -> Iterator[Change]:
    """The same function by other weights, where emulation agrees that it overflows no more."""
    found = rescaling(evidence.original.config, over) if over else None
    if found is None:
        return
    weights = found.apply(evidence.original)
    outcome = emulate(apply(weights, evidence.scheme), evidence.tokens, evidence.arithmetic)
    if outcome.finite:
        what = f"the checkpoint rescaled: {describe(found.told)}"
        yield Change(what, evidence.arithmetic, weights=weights, confirmed=outcome)


def _other_schemes(evidence: Evidence, bench: Bench, peaks: Mapping[str, Peak]) -> Iterator[Change]:
    """Those whose arithmetic holds the model's values: of about the same size first, none that keeps less before."""
    config = evidence.original.config
    size = stored_bytes(config, evidence.scheme)

    def distance(scheme: str) -> tuple[bool, float]:
        more = stored_bytes(config, scheme) - size
        return more < 0, abs(more)

    fits = [
        name
        for name, arithmetic in bench.schemes.items()
        if name != evidence.scheme and not excess(peaks, arithmetic, config)
    ]
    for scheme in sorted(fits, key=distance)[:2]:
        arithmetic = bench.schemes[scheme]
        yield Change(f"scheme {scheme} ({arithmetic})", arithmetic, scheme=scheme)
