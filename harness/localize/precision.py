"""Errors that a coarser arithmetic than the declared one makes, and errors that grow."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as combinations
from typing import Any, NamedTuple

import numpy as np

from harness.compare import nrms
from harness.localize.match import DRAWS, FAR, Place
from harness.localize.match_whole import Whole
from harness.tolerance import K
from reference.numerics import ROUND, UNIT_ROUNDOFF, Arithmetic, Emulated

#: A coarser arithmetic explains an error between its least draw divided by this and its largest times this.
_ALIKE = 1.6
_DRAWS = 3


class Coarser(NamedTuple):
    """An arithmetic coarser than declared, in words; ``grid``: the type that all its results are of, if one."""

    what: str
    arithmetic: Arithmetic
    grid: str = ""


def variants(declared: Arithmetic) -> list[Coarser]:
    """Arithmetics with one thing coarser than declared."""
    parts = {
        "accumulation": "sums of products are kept in {}",
        "wkv": "WKV is computed in {}",
        "residual": "the residual stream is kept in {}",
        "activations": "results are rounded to {}",
    }
    found = []
    for (name, words), kind in combinations(parts.items(), ("fp16", "bf16")):
        now = getattr(declared, name)
        if UNIT_ROUNDOFF[kind] > UNIT_ROUNDOFF.get(now, 0.0):
            changes: dict[str, Any] = {name: kind}
            found.append(Coarser(words.format(kind), replace(declared, **changes), kind * (name == "activations")))
    if declared.activations in ("fp32", "fp16"):
        found.append(Coarser("inputs of products are rounded to int8", replace(declared, activations="int8x32")))
    if declared.activations == "fp32":
        found.append(Coarser("inputs of products are rounded to fp16", replace(declared, activations="fp16in")))
    if declared.chain < 4096:
        found.append(Coarser("products are summed up in one chain", replace(declared, chain=1 << 14)))
    return found


def coarser(found: Place) -> str:
    """A coarser arithmetic that makes an error like the one seen; empty where none does."""
    error, declared = nrms(found.got, found.right), found.unavoidable(None, found.right)
    if not error > K * declared or not _like_noise(found.got, found.right):
        return ""
    grids = [f"every value is one of {kind}" for kind in ("bf16", "fp16") if _on_grid(found, kind)]
    fitting = []
    for what, arithmetic, grid in variants(found.arithmetic):
        draws = [nrms(found.made(Emulated(arithmetic, seed)), found.right) for seed in range(_DRAWS)]
        if not min(draws) > _ALIKE * declared:
            continue
        left = nrms(found.got, found.made(Emulated(arithmetic, 0)))
        if left <= FAR * error:
            text = f"{what}: emulating that reproduces what is shown to {left:.1e}"
            return f"{text}, the declared {found.arithmetic} is off by {error:.1e}"
        if min(draws) / _ALIKE <= error <= max(draws) * _ALIKE and (not grid or _on_grid(found, grid)):
            fitting.append(f"{what} (emulated {min(draws):.1e} to {max(draws):.1e})")
    if not fitting and not grids:
        return ""
    text = f"precision: the error {error:.1e} is without pattern, the declared {found.arithmetic} makes {declared:.1e}"
    return "; ".join([text, *(["it is as large as if " + ", or ".join(fitting)] if fitting else []), *grids])


def coarser_whole(found: Whole) -> str:
    """The same of what a backend shows at its end; empty where none fits."""
    fitting = []
    for what, arithmetic, _ in variants(found.evidence.arithmetic):
        errors = [found.emulated(arithmetic, seed) for seed in range(DRAWS)]
        if not min(errors) > _ALIKE * found.unavoidable:
            continue
        if min(errors) / _ALIKE <= found.off <= max(errors) * _ALIKE:
            fitting.append(f"{what} (emulated {min(errors):.1e} to {max(errors):.1e})")
    if not fitting or found.off > 0.2:
        return ""
    declared = f"the declared {found.evidence.arithmetic} makes {found.unavoidable:.1e}"
    return f"precision: the error {found.off:.1e} is as large as if {', or '.join(fitting)}; {declared}"


def _on_grid(found: Place, kind: str) -> bool:
    """Whether every value is one of a type coarser than that of the declared results."""
    declared = found.arithmetic.residual if found.step.name.endswith("residual") else found.arithmetic.activations
    if UNIT_ROUNDOFF[kind] <= UNIT_ROUNDOFF.get(declared, 0.0) and declared in ROUND:
        return False
    got = found.got.astype(np.float32)
    return bool(np.array_equal(ROUND[kind](got), got) and np.any(got != np.round(got)))


def _like_noise(got: np.ndarray, right: np.ndarray) -> bool:
    """Whether the error has neither a direction nor a place: small, unrelated to the result, spread over lines."""
    off = got - right
    if nrms(got, right) > 0.2 or not np.any(off):
        return False
    related = float((off * right).sum() / np.sqrt(np.square(off).sum() * np.square(right).sum()))
    energy = np.square(off)
    shares = (energy.sum(axis=axis) / energy.sum() for axis in (0, 1))
    return abs(related) < 0.5 and all(share.max() < max(0.5, 8 / share.size) for share in shares)
