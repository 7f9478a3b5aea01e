"""A wrong result in words and figures, where no hypothesis reproduces it: which rows, which factor, which pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from harness.compare import nrms

#: A line is wrong where its error exceeds the bound by this factor, since it is one of many.
_LINE = 3.0


def wrong_lines(got: np.ndarray, right: np.ndarray, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and channels with an error over the bound, in units of ``right``'s RMS; NaN counts."""
    size = float(np.sqrt(np.mean(np.square(right)))) or 1.0
    off = np.square(np.nan_to_num(got - right, nan=np.inf, posinf=np.inf, neginf=np.inf) / size)
    elements = ~(off <= np.square(_LINE * 3 * bound))
    tokens = ~(np.sqrt(off.mean(axis=1)) <= _LINE * bound) | elements.any(axis=1)
    channels = ~(np.sqrt(off.mean(axis=0)) <= _LINE * bound) | elements.any(axis=0)
    return np.flatnonzero(tokens), np.flatnonzero(channels)


def tokens_in_words(wrong: np.ndarray, n: int) -> str:
    """``only at tokens 40 to 47``."""
    return f"only {_in_words('token', wrong, n)}"


def channels_in_words(wrong: np.ndarray, n: int) -> str:
    """``only in channels 96 to 127``."""
    return f"only {_in_words('channel', wrong, n)}"


def _in_words(kind: str, wrong: np.ndarray, n: int) -> str:
    near = "at" if kind == "token" else "in"
    if wrong.size == 1:
        return f"{near} {kind} {wrong[0]}"
    gaps = np.diff(wrong)
    if (gaps == 1).all():
        return f"{near} {kind}s {wrong[0]} to {wrong[-1]} of {n}"
    if wrong.size > 2 and (gaps == gaps[0]).all():
        return f"{near} every {_ordinal(int(gaps[0]))} {kind} from {wrong[0]} (of {n})"
    listed = ", ".join(map(str, wrong[:6])) + (", ..." if wrong.size > 6 else "")
    return f"{near} {wrong.size} of {n} {kind}s ({listed})"


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third", 4: "fourth"}.get(n, f"{n}th")


#: Rearrangements of a right result that a backend may show: name -> (T, width) to the same.
_REARRANGED: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "channels are off by one": lambda x: np.roll(x, 1, axis=1),
    "channels are off by one, backwards": lambda x: np.roll(x, -1, axis=1),
    "channels are in reverse order": lambda x: x[:, ::-1],
    "the halves of the channels are exchanged": lambda x: np.roll(x, x.shape[1] // 2, axis=1),
    "neighbouring channels are exchanged": lambda x: x[:, np.arange(x.shape[1]) ^ 1] if x.shape[1] % 2 == 0 else x,
    "channels are off by 32": lambda x: np.roll(x, 32, axis=1),
    "channels are off by 32, backwards": lambda x: np.roll(x, -32, axis=1),
    "results are one token late": lambda x: np.concatenate([x[:1], x[:-1]]),
    "results are one token early": lambda x: np.concatenate([x[1:], x[-1:]]),
    "tokens are in reverse order": lambda x: x[::-1],
    "every token has the result of the last": lambda x: np.repeat(x[-1:], len(x), axis=0),
    "every token has the result of the first": lambda x: np.repeat(x[:1], len(x), axis=0),
    "tokens and channels are laid out in the other order": lambda x: x.reshape(x.shape[1], x.shape[0]).T,
    "the sign is wrong": lambda x: -x,
    "the magnitude is right, the sign lost": np.abs,
    "results are rounded to whole numbers": np.round,
}


def rearranged(got: np.ndarray, right: np.ndarray, bound: float) -> list[str]:
    """Rearrangements of the right result that are what is shown, each with its error."""
    found = []
    wrong = nrms(got, right)
    for sentence, change in _REARRANGED.items():
        error = nrms(_edges(got), _edges(change(right)))
        if error <= max(bound, 0.02 * wrong) and error <= 0.25 * wrong:
            found.append(
                f"{sentence}: that is what the backend shows to {error:.1e}, in place it is off by {wrong:.1e}"
            )
    return found


def _edges(x: np.ndarray) -> np.ndarray:
    """Without the first and last token and channel, where what is shifted is cut off in one way or another."""
    return x[1:-1, 1:-1] if min(x.shape) > 4 else x


def shown_elsewhere(
    got: np.ndarray, others: Mapping[str, np.ndarray], name: str, right: np.ndarray, bound: float
) -> str:
    """Another result of the same block that stands in its place; empty where there is none."""
    for other, value in others.items():
        if other != name and value.shape == got.shape and nrms(got, value) <= max(bound, 0.01 * nrms(got, right)):
            left, wrong = nrms(got, value), nrms(got, right)
            return f"what is shown is {other}, to {left:.1e}; the right result is off by {wrong:.1e}"
    return ""
