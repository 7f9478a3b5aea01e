"""Where a bound comes from: the error that the declared arithmetic itself must make.

    truth   the reference in float64 on the scheme's dequantized weights
    e       error of the reference emulating the declared arithmetic: the largest of DRAWS runs,
            each with other summation orders and roundings; never under FLOOR roundings of the result's own type
    bound   K * e, for each statistic of the comparison

K is fitted: ``scripts/calibrate_bound.py`` prints the distributions on either side of it, for two sets of
seeds, and docs/tolerance.md keeps them. Truth and e are cached by content.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import reference
from harness import compare
from harness.budget import hold
from harness.compare import LogitsError, StateError, logits_error, spread, state_error
from harness.hardware import SMALL_PARAMETERS
from reference.cache import cache_folder
from reference.config import count_parameters
from reference.forward import Tokens, forward
from reference.mixed import Mixed
from reference.numerics import UNIT_ROUNDOFF, Arithmetic
from reference.schemes import apply
from reference.weights import Weights

K = 3.0
#: e varies more between prompts than between draws, so the largest of a few will do.
DRAWS = 4
#: Fraction of the logits' spread from which a bound lets all but gross faults through. Unrelated logits are off
#: by 1.4; the embedded model with every decay 1 % wrong, by 0.002.
COARSE = 0.1
#: Roundings of the result's type that no comparison can see below: the result itself is rounded, and
#: so is the input of the last product.
FLOOR = 2.0


@dataclass(frozen=True)
class Truth:
    """What a backend is compared with over one prompt, and how far it may be off.

    logits ``(T, n_vocab)``, state ``(n_layer, 5, n_embd)``, both float64; ``middle`` the state after
    the first half of the prompt. Unavoidable errors ``e_*`` are the largest of the emulated runs.
    ``overflows``: the declared arithmetic itself gives NaN or Inf on this model, whoever computes it.
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
    overflows: float = 0.0

    @property
    def coarse(self) -> bool:
        """Whether the declared arithmetic alone is off by so much that only gross faults exceed the bound."""
        return not K * self.e_rms <= COARSE

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
    weights: Weights, scheme: str, arithmetic: Arithmetic | Mixed, tokens: Tokens, cache_key: str | None = None
) -> Truth:
    """Truth and bounds for ``tokens`` from the initial state.

    ``cache_key`` is the content hash of ``weights``; without one nothing is cached.
    """
    path = _cache_path(cache_key, scheme, arithmetic, tokens) if cache_key else None
    cached = _read(path, tokens) if path is not None else None
    if cached is not None:
        return cached
    # The products of short chains are too small for more threads than one to pay.
    with threadpool_limits(1, user_api="blas"):
        truth = _compute(hold(apply(weights, scheme)), arithmetic, tokens)
    if path is not None:
        _save(path, {name: getattr(truth, name) for name in (*_SCALARS, *_ARRAYS)})
    return truth


#: Beyond this many multiply-adds (some twenty seconds of two cores) the reference does not run a timed prompt.
_LONG_WORK = 1 << 39


def beyond_gate(
    weights: Weights, scheme: str, prompt: Sequence[int], following: Sequence[int], cache_key: str | None = None
) -> np.ndarray | None:
    """Truth's logits ``(1 + len(following), n_vocab)`` after a timed prompt and after each token fed then.

    ``None`` where the model and the prompt are so large that the reference would take too long.
    """
    if len(prompt) * count_parameters(weights.config) > _LONG_WORK:
        return None
    path = _cache_path(cache_key, scheme, Arithmetic(), [*prompt, -1, *following]) if cache_key else None
    cached = _load(path, ("logits",)) if path is not None else None
    if cached is not None:
        return cached["logits"]
    with threadpool_limits(1 if count_parameters(weights.config) < SMALL_PARAMETERS else None, user_api="blas"):
        stored = hold(apply(weights, scheme))
        last, state = forward(stored, prompt, dtype=np.float64)
        rows, _ = forward(stored, following, state, all_logits=True, dtype=np.float64)
    logits = np.concatenate([last[None], rows])
    if path is not None:
        _save(path, {"logits": logits})
    return logits


def growth(
    weights: Weights,
    scheme: str,
    arithmetic: Arithmetic,
    prompt: Sequence[int],
    following: Sequence[int],
    truth: Truth,
    beyond: np.ndarray,
    cache_key: str | None = None,
) -> float:
    """How many times e the arithmetic itself is off by at the positions of :func:`beyond_gate`; at least 1.

    Rounding adds up in the state: with keys of 60 the exponents alone are off by some 4e-6 a token in float32.
    """
    path = _cache_path(cache_key, scheme, arithmetic, [*prompt, -2, *following]) if cache_key else None
    cached = _load(path, ("growth",)) if path is not None else None
    if cached is not None:
        return float(cached["growth"])
    found = [1.0]
    with threadpool_limits(1, user_api="blas"):
        stored = hold(apply(weights, scheme))
        for seed in range(DRAWS):
            last, state = forward(stored, prompt, arithmetic=arithmetic, seed=seed)
            rows, _ = forward(stored, following, state, all_logits=True, arithmetic=arithmetic, seed=seed)
            error = logits_error(np.concatenate([last[None], rows]), beyond, truth.unit)
            found += [error.worst / truth.e_worst, error.peak / truth.e_peak]
    factor = max(x for x in found if np.isfinite(x))
    if path is not None:
        _save(path, {"growth": np.float64(factor)})
    return factor


def _compute(weights: Weights, arithmetic: Arithmetic | Mixed, tokens: Tokens) -> Truth:
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
        # An emulation that overflows gives no bound: then only a finite result can pass, against the floor.
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
        overflows=float(not all(np.isfinite(e.rms) for e, _ in errors)),
    )


@lru_cache(maxsize=1)
def _reference_version() -> str:
    """Hash of the source that truth and e come from: what other code has computed is not ours."""
    digest = hashlib.sha256()
    for file in [*sorted(Path(reference.__file__).parent.glob("*.py")), Path(compare.__file__), Path(__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cache_path(cache_key: str, scheme: str, arithmetic: Arithmetic | Mixed, tokens: Tokens) -> Path:
    text = repr((cache_key, scheme, arithmetic, tuple(int(t) for t in tokens), K, _reference_version(), np.__version__))
    return cache_folder() / "truth" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


_SCALARS = ("e_rms", "e_worst", "e_peak", "e_state_rms", "e_state_worst", "overflows")
_ARRAYS = ("logits", "state", "middle")


def _read(path: Path, tokens: Tokens) -> Truth | None:
    """A cached truth; ``None`` for none or a damaged one, which is then computed and written again."""
    found = _load(path, (*_SCALARS, *_ARRAYS))
    if found is None:
        return None
    parts: dict[str, Any] = {name: float(found[name]) if name in _SCALARS else found[name] for name in found}
    return Truth(tokens=tuple(int(t) for t in tokens), **parts)


def _load(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write atomically; a cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, **arrays)
        os.replace(file.name, path)
    except OSError:
        return
