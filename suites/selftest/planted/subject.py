"""What faults are planted in: a model, an arithmetic with its scheme, a prompt, and truth for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import harness.models
from harness.models import gate_tokens, open_model
from harness.timed_check import following
from harness.tolerance import Truth, beyond_gate, derive, growth
from reference.config import Config
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

#: Length of the gate's prompt, and of the timed one.
GATE, TIMED = 48, 200


#: Every third random model has keys so many times larger: trained ones reach 60 and more, and e^88 is too much.
LARGE_KEYS = 30


@dataclass(frozen=True)
class Kind:
    """An arithmetic and the scheme it is usually met with."""

    scheme: str
    arithmetic: Arithmetic


#: Name -> arithmetic, as backends here declare them.
KINDS: dict[str, Kind] = {
    "fp32": Kind("fp32", Arithmetic()),
    "fp16": Kind("fp16", Arithmetic("fp16", residual="fp16")),
    "bf16": Kind("bf16", Arithmetic("bf16", residual="bf16")),
    "int8x32": Kind("Q8_0", Arithmetic("int8x32")),
}


@dataclass(frozen=True, eq=False)
class Model:
    """``weights`` before any scheme; ``key`` names them in the cache of truths."""

    name: str
    weights: Weights
    tokens: tuple[int, ...]
    key: str | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in a scheme and arithmetic, with what is true of it.

    stored  the scheme's weights in float32
    beyond  truth's logits after the timed prompt and each of the tokens fed then
    growth  how much more the arithmetic itself is off there
    """

    model: Model
    kind: str
    scheme: str
    arithmetic: Arithmetic
    stored: Weights
    truth: Truth
    beyond: np.ndarray
    growth: float

    @property
    def prompt(self) -> list[int]:
        """The timed prompt; the gate's is its beginning."""
        return list(self.model.tokens)


def model(name: str) -> Model:
    """``tiny``, or a random model by its seed."""
    return tiny() if name == "tiny" else random(int(name))


@lru_cache(maxsize=2)
def tiny() -> Model:
    """The embedded model on its own text."""
    found = open_model("tiny")
    return Model("tiny", found.weights, tuple(gate_tokens(found, TIMED)), found.sha256)


@lru_cache(maxsize=8)
def random(seed: int) -> Model:
    """A small model with random weights, on random tokens."""
    rng = np.random.default_rng([seed, 77])
    config = Config(int(rng.integers(2, 5)), 64, int(rng.choice([192, 256])), int(rng.integers(130, 300)))
    weights = synthetic(config, seed, float(rng.choice([0.7, 1.0, 1.4])))
    keys = float(LARGE_KEYS if seed % 3 == 2 else 1)

    def change(name: str, tensor: Tensor) -> Tensor:
        array = tensor.array(np.float32)
        if array.ndim == 1:  # no half precision number, so that rounding it is a fault
            array = array * (1 + 1e-3 * rng.standard_normal(array.shape, dtype=np.float32))
        return Tensor.of(array * np.float32(keys) if name.endswith("att.key.weight") else array)

    weights = weights.map(change)
    prompt = gate_tokens(harness.models.Model(f"random {seed}", weights, ""), TIMED, seed)
    return Model(f"random {seed}", weights, tuple(prompt))


@lru_cache(maxsize=16)
def subject(model: Model, kind: str, scheme: str | None = None) -> Subject:
    """Truth and bounds of a model in one arithmetic; ``scheme`` where it is not the usual."""
    found = KINDS[kind]
    scheme = scheme or found.scheme
    stored = apply(model.weights, scheme).in_memory(np.float32)
    truth = derive(model.weights, scheme, found.arithmetic, model.tokens[:GATE], model.key)
    prompt = list(model.tokens)
    beyond = beyond_gate(model.weights, scheme, prompt, following(prompt), model.key)
    assert beyond is not None
    grown = growth(model.weights, scheme, found.arithmetic, prompt, following(prompt), truth, beyond, model.key)
    return Subject(model, kind, scheme, found.arithmetic, stored, truth, beyond, grown)
