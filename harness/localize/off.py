"""How far one result is off from another, in five ways that each see other faults, and how far it may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from harness.tolerance import FLOOR, K
from reference.numerics import INPUTS, UNIT_ROUNDOFF, Arithmetic

#: Roundings of float32 that a correct operation may be off by beside those of its result: an exponential, a
#: reciprocal square root or a logistic function of a runtime's own is good to a few units in the last place.
OWN_FUNCTIONS = 8 * 2.0**-24

#: Part of the error of single elements that may be common to all of them: rounding errors mostly cancel in a factor.
COMMON = 0.125


#: Of the RMS of all: elements below it do not count for more than one of its size.
SMALL = 0.1


@dataclass(frozen=True)
class Off:
    """Distances of ``got (T, width)`` from what was expected, each over the RMS of the latter.

    rms     of all elements: what is wrong everywhere
    row     RMS of the worst row: what is wrong at one token
    column  RMS of the worst column: what is wrong in one channel
    peak    largest element
    small   RMS of all elements, each over its own size (and SMALL of the RMS): what is wrong where little is expected
    factor  distance from 1 of the factor that best makes one of the other: a wrong scale under coarse rounding
    """

    rms: float
    row: float
    column: float
    peak: float
    small: float
    factor: float

    def worst(self, bound: Off, alone: bool) -> tuple[float, float]:
        """The distance that is largest against its bound, and that bound. A NaN is larger than anything.

        ``alone``: of one operation; only there do ``small`` and ``factor`` count. Where results are handed on, so are
        the factors of earlier errors, and small elements are differences of large ones.
        """
        pairs = list(zip(astuple(self), astuple(bound), strict=True))[: None if alone else -2]
        return max(pairs, key=lambda pair: _ratio(*pair))


def off(got: np.ndarray, expected: np.ndarray, unit: float | None = None) -> Off:
    """Compare two arrays of one shape; ``unit``: RMS of what is expected, where these are only some of its rows."""
    a, b = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    unit = rms(b) if unit is None else unit
    with np.errstate(invalid="ignore", over="ignore"):
        squares = np.square(a - b)
        power = float(np.mean(np.square(b)))
        factor = abs(float(np.mean(a * b)) / power - 1) if power > 0 else 0.0
        return _off(squares, b, unit, factor)


def first_place(got: np.ndarray, expected: np.ndarray, bound: Off) -> tuple[int, int]:
    """Token and channel: the first row that is beyond its bound, else the worst, and its worst element."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(np.asarray(got, dtype=np.float64) - expected)
        rows = np.sqrt(np.mean(np.square(difference), axis=1))
    beyond = np.flatnonzero(~(rows <= bound.row * rms(expected)))
    token = int(beyond[0]) if beyond.size else int(rows.argmax())
    return token, int(difference[token].argmax())


def size(expected: np.ndarray, unit: float | None = None) -> Off:
    """What a relative error of 1 of every element comes to in each of the distances."""
    b = np.asarray(expected, dtype=np.float64)
    return _off(np.square(b), b, rms(b) if unit is None else unit, 1.0)


def allowed(drawn: Sequence[Off], least: Off, roundings: float) -> Off:
    """K times the largest of what emulated runs are off by, and never under ``roundings`` of every element.

    A run that overflows gives no bound: then only a finite result can be right.
    """
    known = [one for one in drawn if np.isfinite(astuple(one)).all()]

    def largest_of(name: str) -> float:
        return max(roundings * float(getattr(least, name)), *(float(getattr(one, name)) for one in known), 0.0)

    most = {name: largest_of(name) for name in _NAMES}
    most["factor"] = max(most["factor"], COMMON * most["rms"])
    return Off(**{name: K * value for name, value in most.items()})


def rounding(arithmetic: Arithmetic, point: str) -> float:
    """Relative error that rounding alone may make of one operation's result."""
    kinds = {"fp32" if arithmetic.activations in INPUTS else arithmetic.activations}
    if point.endswith(("residual", "emb", "ln0")):
        kinds.add(arithmetic.residual)
    if point.endswith("wkv"):
        kinds.add(arithmetic.wkv)
    return FLOOR * max(UNIT_ROUNDOFF[kind] for kind in kinds) + OWN_FUNCTIONS


def largest(values: np.ndarray) -> float | None:
    """Largest finite magnitude; ``None`` where nothing is finite."""
    finite = np.isfinite(values)
    return float(np.abs(values[finite]).max()) if finite.any() else None


def finite(arrays: Iterable[np.ndarray]) -> bool:
    """Whether there is neither NaN nor Inf in any."""
    return all(bool(np.isfinite(x).all()) for x in arrays)


def rms(x: np.ndarray) -> float:
    """Root of the mean square, in float64."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, dtype=np.float64)))))


_NAMES = tuple(field.name for field in fields(Off))


def _off(squares: np.ndarray, expected: np.ndarray, unit: float, factor: float) -> Off:
    """From squared differences ``(T, width)``."""
    sizes = np.square(np.abs(expected) + SMALL * unit)
    with np.errstate(over="ignore", divide="ignore"):  # beyond float64, or where nothing is expected: infinite
        small = np.divide(squares, sizes, out=np.zeros_like(squares), where=squares != 0).mean()
    rows, columns = squares.mean(axis=1), squares.mean(axis=0)

    def over(square: float) -> float:
        return _over(float(np.sqrt(square)), unit)

    return Off(
        over(rows.mean()), over(rows.max()), over(columns.max()), over(squares.max()), float(np.sqrt(small)), factor
    )


def _over(error: float, unit: float) -> float:
    if unit > 0:
        return error / unit
    return 0.0 if error == 0 else float("inf")


def _ratio(error: float, bound: float) -> float:
    if not np.isfinite(error):
        return float("inf")
    return error / bound if bound > 0 else (0.0 if error == 0 else float("inf"))
