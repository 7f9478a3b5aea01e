"""Where a bound comes from: the error that the declared arithmetic itself must make.

    truth   the reference in float64 on the scheme's dequantized weights
    e       error of the reference emulating the declared arithmetic: the largest of DRAWS runs,
            each with other summation orders; never under FLOOR roundings of the result's own type
    bound   K * e, for each statistic of the comparison

K is the only constant that is chosen. ``scripts/calibrate_bound.py`` fits it on one set of seeds and
confirms it on another; docs/tolerance.md has both distributions. Truth and e are cached by content.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import reference
from harness.budget import hold
from harness.cache import cache_folder
from harness.compare import LogitsError, StateError, logits_error, spread, state_error
from reference.forward import Tokens, forward
from reference.numerics import UNIT_ROUNDOFF, Arithmetic
from reference.schemes import apply
from reference.weights import Weights

K = 3.0
DRAWS = 4
#: Roundings of the result's type that no comparison can see below: the result itself is rounded, and
#: so is the input of the last product.
FLOOR = 2.0


@dataclass(frozen=True)
class Truth:
    """What a backend is compared with over one prompt, and how far it may be off.

    logits ``(T, n_vocab)``, state ``(n_layer, 5, n_embd)``, both float64; ``middle`` the state after
    the first half of the prompt. Unavoidable errors ``e_*`` are those of one emulated run.
    """

    tokens: tuple[int, ...]
    logits: np.ndarray
    state: np.ndarray
    middle: np.ndarray
    e_rms: float
    e_worst: float
    e_peak: float
    e_state_rms: float
    e_state_worst: float

    @cached_property
    def unit(self) -> float:
        """What errors of logits are measured in, for any part of this prompt."""
        return spread(self.logits)

    def logits_ratios(self, error: LogitsError) -> dict[str, tuple[float, float]]:
        """Statistic -> (error, bound)."""
        return {
            "rms": (error.rms, K * self.e_rms),
            "worst position": (error.worst, K * self.e_worst),
            "largest element": (error.peak, K * self.e_peak),
        }

    def state_ratios(self, error: StateError) -> dict[str, tuple[float, float]]:
        """Statistic -> (error, bound)."""
        return {
            "state rms": (error.rms, K * self.e_state_rms),
            "worst state row": (error.worst, K * self.e_state_worst),
        }


def derive(
    weights: Weights, scheme: str, arithmetic: Arithmetic, tokens: Tokens, cache_key: str | None = None
) -> Truth:
    """Truth and bounds for ``tokens`` from the initial state.

    ``cache_key`` is the content hash of ``weights``; without one nothing is cached.
    """
    path = _cache_path(cache_key, scheme, arithmetic, tokens) if cache_key else None
    if path is not None and path.is_file():
        cached = _read(path, tokens)
        if cached is not None:
            return cached
    # The products of short chains are too small for more threads than one to pay.
    with threadpool_limits(1, user_api="blas"):
        truth = _compute(hold(apply(weights, scheme)), arithmetic, tokens)
    if path is not None:
        _write(path, truth)
    return truth


def _compute(weights: Weights, arithmetic: Arithmetic, tokens: Tokens) -> Truth:
    half = max(1, len(tokens) // 2)
    first, middle = forward(weights, tokens[:half], all_logits=True, dtype=np.float64)
    logits, state = first, middle
    if half < len(tokens):
        second, state = forward(weights, tokens[half:], middle, all_logits=True, dtype=np.float64)
        logits = np.concatenate([first, second])
    errors = []
    for seed in range(DRAWS):
        got, got_state = forward(weights, tokens, all_logits=True, arithmetic=arithmetic, seed=seed)
        errors.append((logits_error(got, logits), state_error(got_state, state)))
    floor = FLOOR * UNIT_ROUNDOFF[arithmetic.activations]
    peak_floor = floor * float(np.abs(logits).max() / spread(logits))

    def largest(values: list[float], least: float) -> float:
        # An emulation that overflows gives no bound at all: then only a finite result can pass, against
        # the floor, and the row's reason says that the declared arithmetic itself overflows.
        return max([least, *(v for v in values if np.isfinite(v))])

    return Truth(
        tokens=tuple(int(t) for t in tokens),
        logits=logits,
        state=state,
        middle=middle,
        e_rms=largest([e.rms for e, _ in errors], floor),
        e_worst=largest([e.worst for e, _ in errors], floor),
        e_peak=largest([e.peak for e, _ in errors], peak_floor),
        e_state_rms=largest([s.rms for _, s in errors], floor),
        e_state_worst=largest([s.worst for _, s in errors], floor),
    )


@lru_cache(maxsize=1)
def _reference_version() -> str:
    """Hash of the reference's own source and of this file: truth computed by other code is not ours."""
    digest = hashlib.sha256()
    for file in [*sorted(Path(reference.__file__).parent.glob("*.py")), Path(__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cache_path(cache_key: str, scheme: str, arithmetic: Arithmetic, tokens: Tokens) -> Path:
    text = repr((cache_key, scheme, arithmetic, tuple(int(t) for t in tokens), K, _reference_version(), np.__version__))
    return cache_folder() / "truth" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


_SCALARS = ("e_rms", "e_worst", "e_peak", "e_state_rms", "e_state_worst")


def _read(path: Path, tokens: Tokens) -> Truth | None:
    """A cached truth; ``None`` for a damaged file, which is then computed and written again."""
    try:
        with np.load(path) as file:
            scalars = {name: float(file[name]) for name in _SCALARS}
            arrays = {name: file[name] for name in ("logits", "state", "middle")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    parts: dict[str, Any] = {**arrays, **scalars}
    return Truth(tokens=tuple(int(t) for t in tokens), **parts)


def _write(path: Path, truth: Truth) -> None:
    """Write atomically; a cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, **{n: getattr(truth, n) for n in (*_SCALARS, "logits", "state", "middle")})
        os.replace(file.name, path)
    except OSError:
        return
