"""Correct backends over random models, prompts and scales: none of them may be said to be wrong.

They are numpy with every scheme that has a codec; torch in three types, with one thread and two; the emulated
arithmetics with every scheme they are met with; and correct forms of single operations other than the reference's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from backends.api import Session
from backends.index import load_backend
from harness.localize import localize
from harness.localize.evidence import Opener
from harness.localize.finding import CLEAN
from harness.parity import gate
from harness.session import open_session
from harness.timed_check import following, long_check
from harness.tolerance import Truth, beyond_gate, derive, growth
from reference.config import Config
from reference.numerics import Arithmetic
from reference.schemes import SCHEMES, apply
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights
from suites.selftest.planted.backend import SESSIONS, PlantedBackend
from suites.selftest.planted.equivalent import EQUIVALENTS
from suites.selftest.planted.fault import Patch
from suites.selftest.planted.subject import LARGE_KEYS

#: Arithmetics that are emulated, with schemes they are met with.
EMULATED: dict[str, tuple[Arithmetic, tuple[str, ...]]] = {
    "fp32": (Arithmetic(), ("fp32", "q4f32_1", "ort_int4_g32_asym", "fp32i8")),
    "fp16": (Arithmetic("fp16", residual="fp16"), ("fp16", "q4f16_1", "q8f16_1", "fp16i8")),
    "fp16, residual fp32": (Arithmetic("fp16"), ("q0f16", "q4f16_2")),
    "fp16 throughout": (Arithmetic("fp16", "fp16", "fp16", "fp16"), ("fp16", "q3f16_1")),
    "bf16": (Arithmetic("bf16", residual="bf16"), ("bf16",)),
    "fp16 inputs": (Arithmetic("fp16in"), ("FP16",)),
    "int8x32": (Arithmetic("int8x32"), ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")),
    "int8x32f": (Arithmetic("int8x32f"), ("ort_int4_g32_int8act", "ort_int8_g32_int8act")),
    "int8x64": (Arithmetic("int8x64"), ("sym_int4", "asym_int4", "sym_int8")),
    "int8x128": (Arithmetic("int8x128"), ("ort_int4_g128_int8act",)),
    "int4x32": (Arithmetic("int4x32"), ("Q4_0_v100",)),
    "uint4x32": (Arithmetic("uint4x32"), ("Q4_1_v100",)),
}


@dataclass(frozen=True)
class Clean:
    """One correct backend: who computes, in which scheme, over which random model; localized too, or only judged."""

    who: str
    scheme: str
    seed: int
    localized: bool = False

    def __str__(self) -> str:
        return f"{self.who} {self.scheme}, model {self.seed}"


def clean_runs(n: int, seed: int = 0) -> list[Clean]:
    """``n`` runs, every kind of backend as often as every other; every tenth is localized as well."""
    rng = np.random.default_rng([seed, 5])
    kinds = list(_kinds())
    order = [kinds[i % len(kinds)] for i in range(n)]
    return [Clean(*kind, seed=int(rng.integers(1 << 30)), localized=i % 10 == 9) for i, kind in enumerate(order)]


def _kinds() -> Iterator[tuple[str, str]]:
    yield from (("numpy", name) for name, scheme in SCHEMES.items() if scheme.codec is not None)
    for scheme in ("fp32", "fp16", "bf16"):
        yield "torch, 1 thread", scheme
        yield "torch, 2 threads", scheme
    yield from ((f"emulated {name}", scheme) for name, (_, schemes) in EMULATED.items() for scheme in schemes)
    yield from ((f"emulated fp32 with {name}", "fp32") for name in EQUIVALENTS)
    yield from ((f"emulated fp16 with {name}", "fp16") for name in EQUIVALENTS)


def false_alarm(run: Clean) -> str:
    """What is said to be wrong with a correct backend; empty: nothing, as it should be."""
    weights, tokens = draw(run)
    with opened(run, weights) as (session, arithmetic, opener):
        truth = derive(weights, run.scheme, arithmetic, tokens[: _gate_length(run)])
        said = _said(session, truth, weights, run.scheme, arithmetic, tokens)
        if not said and run.localized:
            found = localize(opener, weights, run.scheme, arithmetic, list(truth.tokens), fix=False)
            said = "" if found.verdict == CLEAN else f"localized: {found.verdict} in {found.point}: {found.cause}"
    return said


def _said(
    session: Session, truth: Truth, weights: Weights, scheme: str, arithmetic: Arithmetic, tokens: list[int]
) -> str:
    found = gate(session, truth)
    if not found.passed:
        return str(found.first_bad)
    beyond = beyond_gate(weights, scheme, tokens, following(tokens))
    assert beyond is not None
    grown = growth(weights, scheme, arithmetic, tokens, following(tokens), truth, beyond)
    check = long_check(session, tokens, truth, beyond, grown)
    return "" if check.passed else str(check)


def draw(run: Clean) -> tuple[Weights, list[int]]:
    """A random model and prompt: shape, scale of weights, size of keys, ids."""
    rng = np.random.default_rng(run.seed)
    narrow = 128 if "128" in run.scheme else 64
    width = narrow * int(rng.integers(1, 3))
    config = Config(int(rng.integers(1, 6)), width, int(rng.choice([2, 4])) * width, int(rng.integers(2, 600)))
    scale = float(rng.choice([0.25, 0.5, 1.0, 1.5, 2.0]))
    keys = np.float32(rng.choice([1, 1, LARGE_KEYS]))
    weights = synthetic(config, run.seed, scale)

    def change(name: str, tensor: Tensor) -> Tensor:
        array = tensor.array(np.float32)
        if array.ndim == 1:
            array = array * (1 + 1e-3 * rng.standard_normal(array.shape, dtype=np.float32))
        return Tensor.of(array * keys if name.endswith("att.key.weight") else array)

    tokens = rng.integers(0, config.n_vocab, int(rng.integers(64, 160)))
    return weights.map(change), [int(i) for i in tokens]


def _gate_length(run: Clean) -> int:
    return int(np.random.default_rng([run.seed, 1]).integers(33, 61))


@contextmanager
def opened(run: Clean, weights: Weights) -> Iterator[tuple[Session, Arithmetic, Opener]]:
    """The session, the arithmetic it declares, and what opens more of it."""
    if run.who.startswith("emulated"):
        arithmetic, backend = _emulated(run)

        @contextmanager
        def again(w: Weights) -> Iterator[Session]:
            yield backend.open(apply(w, run.scheme).in_memory(np.float32))
    else:
        name, _, threads = run.who.partition(", ")
        arithmetic = load_backend(name).INFO.arithmetic(run.scheme, "cpu")

        @contextmanager
        def again(w: Weights) -> Iterator[Session]:
            with open_session(name, w, run.scheme, "cpu", int((threads or "1")[0])) as found:
                yield found.session

    with again(weights) as session:
        yield session, arithmetic, again


def _emulated(run: Clean) -> tuple[Arithmetic, PlantedBackend]:
    name, _, other = run.who.removeprefix("emulated ").partition(" with ")
    arithmetic = EMULATED[name][0]
    patch = EQUIVALENTS[other] if other else Patch()
    shows = list(SESSIONS)[run.seed % len(SESSIONS)]
    return arithmetic, PlantedBackend(arithmetic, patch, shows, seed=run.seed)
