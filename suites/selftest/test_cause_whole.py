"""Causes told from logits or a state alone, of a small RWKV written here token by token with faults of its own."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

from harness.localize.cause import HYPOTHESIS, PATTERN, PRECISION, UNKNOWN, explain
from harness.localize.evidence import Evidence
from harness.localize.pattern import growth
from reference.config import Config
from reference.forward import forward
from reference.numerics import Arithmetic
from reference.synthetic import synthetic
from reference.weights import Weights

CONFIG = Config(n_layer=3, n_embd=32, n_ffn=96, n_vocab=80)
WEIGHTS = synthetic(CONFIG, 8).in_memory()
TOKENS = np.random.default_rng(4).integers(0, 80, 32)
FP32 = Arithmetic()
ALL = (0, 1, 2)


class Small:
    """RWKV-4 one token at a time, float32, in the unstable form; ``fault`` is at work in some ``layers``."""

    def __init__(self, fault: str, layers: Collection[int], n_layer: int = 3) -> None:
        self.w = {name: tensor.array() for name, tensor in WEIGHTS.items()}
        self.fault, self.layers, self.n_layer = fault, layers, n_layer
        self.x_att = np.zeros((n_layer, 32), np.float32)
        self.x_ffn = np.zeros((n_layer, 32), np.float32)
        self.aa = np.zeros((n_layer, 32), np.float32)
        self.bb = np.zeros((n_layer, 32), np.float32)

    def on(self, fault: str, layer: int) -> bool:
        return self.fault == fault and layer in self.layers

    def norm(self, x: np.ndarray, name: str, eps: float = 1e-5) -> np.ndarray:
        y: np.ndarray = (x - x.mean()) / np.sqrt(x.var() + eps) * self.w[name + ".weight"] + self.w[name + ".bias"]
        return y

    def step(self, token: int) -> np.ndarray:
        x = self.w["emb.weight"][token]
        if self.fault != "ln0 skipped":
            x = self.norm(x, "blocks.0.ln0")
        for i in range(self.n_layer):
            x = x + self.att(self.norm(x, f"blocks.{i}.ln1", 1e-3 if self.on("eps", i) else 1e-5), i)
            x = x + self.ffn(self.norm(x, f"blocks.{i}.ln2"), i)
        if self.fault != "ln_out skipped":
            x = self.norm(x, "ln_out")
        return np.asarray(self.w["emb.weight" if self.fault == "tied" else "head.weight"] @ x)

    def att(self, h: np.ndarray, i: int) -> np.ndarray:
        at = f"blocks.{i}.att."
        past, mu = self.x_att[i], {c: self.w[f"{at}time_mix_{c}"] for c in "kvr"}
        if self.on("mix r and k", i):
            mu["k"], mu["r"] = mu["r"], mu["k"]
        k, v, r = (
            self.w[f"{at}{name}.weight"] @ (h * mu[c] + past * (1 - mu[c]))
            for c, name in (("k", "key"), ("v", "value"), ("r", "receptance"))
        )
        self.x_att[i] = 0 if self.on("att_x lost", i) else h
        decay, u = np.exp(-np.exp(self.w[at + "time_decay"])), self.w[at + "time_first"]
        if self.on("no decay", i):
            decay = np.ones_like(decay)
        u = 2 * u if self.on("u doubled", i) else u
        y = (self.aa[i] + np.exp(u + k) * v) / (self.bb[i] + np.exp(u + k))
        self.aa[i] = decay * self.aa[i] + np.exp(k) * v
        self.bb[i] = (1 if self.on("bb not decayed", i) else decay) * self.bb[i] + np.exp(k)
        gate = 1 if self.on("no gate", i) else 1 / (1 + np.exp(-r))
        return np.asarray(self.w[at + "output.weight"] @ (gate * y))

    def ffn(self, h: np.ndarray, i: int) -> np.ndarray:
        at, past = f"blocks.{i}.ffn.", self.x_ffn[i]
        mk, mr = self.w[at + "time_mix_k"], self.w[at + "time_mix_r"]
        k = self.w[at + "key.weight"] @ (h * mk + past * (1 - mk))
        r = self.w[at + "receptance.weight"] @ (h * mr + past * (1 - mr))
        self.x_ffn[i] = h
        k = np.maximum(k, 0) if self.on("no square", i) else np.maximum(k, 0) ** 2
        r = r if self.on("no sigmoid", i) else 1 / (1 + np.exp(-r))
        return np.asarray(r * (self.w[at + "value.weight"] @ k))

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits of every position, and the canonical state, with pp 0."""
        logits = np.stack([self.step(int(token)) for token in TOKENS])
        return logits, np.stack([self.x_ffn, self.x_att, self.aa, self.bb, 0 * self.aa], axis=1)


def first(weights: Weights, k: int) -> Weights:
    """The first k layers."""
    config = Config(k, CONFIG.n_embd, CONFIG.n_ffn, CONFIG.n_vocab)
    return Weights(
        config, {n: t for n, t in weights.items() if not n.startswith("blocks.") or int(n.split(".")[1]) < k}
    )


FAULTS = {
    "mix r and k": "att.time_mix_k and time_mix_r are exchanged",
    "no decay": "the past does not decay",
    "u doubled": "time_first (u) is added twice",
    "bb not decayed": "bb does not decay",
    "no gate": "the receptance is not applied",
    "no square": "relu is not squared",
    "no sigmoid": "the logistic function is skipped",
    "eps": "ln1 has eps 1e-3 where RWKV-4 has 1e-5",
    "att_x lost": "the token before is taken as zero",
}
ONCE = {"ln0 skipped": "ln0 is skipped", "ln_out skipped": "ln_out is skipped", "tied": "emb is used as head"}


def test_the_small_one_is_right() -> None:
    logits, state = Small("", ()).run()
    truth, _ = forward(WEIGHTS, TOKENS, all_logits=True, dtype=np.float64)
    assert np.abs(logits - truth).max() < 1e-4 * truth.std()
    cause = explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, logits=logits, state=state))
    assert cause.kind not in (HYPOTHESIS, PRECISION)


@pytest.mark.parametrize("layers", [ALL, (1,)], ids=["all", "one"])
@pytest.mark.parametrize("fault", FAULTS)
def test_logits_of_a_truncated_model(fault: str, layers: tuple[int, ...]) -> None:
    """The smallest that fails: all that truncation leaves to go by."""
    k = layers[0] + 1
    logits, _ = Small(fault, layers, k).run()
    weights = first(WEIGHTS, k)
    cause = explain(Evidence(weights, weights, "fp32", FP32, TOKENS, layer=k - 1, logits=logits))
    assert cause.kind == HYPOTHESIS, cause.text
    assert FAULTS[fault] in cause.text


@pytest.mark.parametrize("layers", [ALL, (1,)], ids=["all", "one"])
@pytest.mark.parametrize("fault", sorted({*FAULTS} - {"att_x lost"}))
def test_state_of_the_whole_model(fault: str, layers: tuple[int, ...]) -> None:
    """Rows of every layer, no logits; a fault of the second half shows in the next layer only."""
    _, state = Small(fault, layers).run()
    layer = layers[0] + (fault in ("no gate", "no square", "no sigmoid"))
    cause = explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, layer=layer, state=state))
    assert cause.kind == HYPOTHESIS, cause.text
    assert FAULTS[fault] in cause.text
    assert ("in every layer" in cause.text) == (layers == ALL)


@pytest.mark.parametrize("fault", ONCE)
def test_what_exists_once(fault: str) -> None:
    logits, _ = Small(fault, ()).run()
    cause = explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, logits=logits))
    assert ONCE[fault] in cause.text
    assert "layer" not in cause.text


@pytest.mark.parametrize("fault", ["no decay", "no sigmoid"])
def test_logits_of_a_library_that_cannot_be_truncated(fault: str) -> None:
    for layers, words in ((ALL, "in every layer"), ((2,), "in layer 2 alone")):
        logits, _ = Small(fault, layers).run()
        cause = explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, logits=logits))
        assert FAULTS[fault] in cause.text
        assert words in cause.text


def test_rows_of_the_state_that_only_the_state_shows() -> None:
    logits, state = Small("", ()).run()
    wrong = state.copy()
    wrong[:, [0, 1]] = wrong[:, [1, 0]]
    cause = explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, logits=logits, state=wrong))
    assert "att_x and ffn_x are exchanged" in cause.text
    wrong = state.copy()
    wrong[[0, 2]] = wrong[[2, 0]]
    cause = explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, logits=logits, state=wrong))
    assert cause.kind == PATTERN
    assert "att_x of layer 0 holds att_x of layer 2" in cause.text


def test_logits_that_are_moved() -> None:
    logits, _ = Small("", ()).run()
    cause = explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, logits=np.roll(logits, 1, axis=1)))
    assert "rows are off by one" in cause.text or "channels are off by one" in cause.text


def test_a_coarser_arithmetic_of_the_whole_model() -> None:
    logits, _ = forward(WEIGHTS, TOKENS, all_logits=True, arithmetic=Arithmetic(accumulation="fp16"), seed=9)
    cause = explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, logits=logits))
    assert cause.kind == PRECISION
    assert "sums of products are kept in fp16" in cause.text


def test_an_error_that_grows_with_position() -> None:
    logits, _ = Small("", ()).run()
    rng = np.random.default_rng(0)
    logits = logits + np.arange(32)[:, None] * 1e-2 * rng.standard_normal(logits.shape)
    cause = explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, logits=logits))
    assert "the error grows by " in cause.text


def test_growth_has_a_slope() -> None:
    errors = 1e-6 + 2e-7 * np.arange(40)
    assert growth(errors, 1e-7).startswith("the error grows by 2.0e-07 a position")
    assert growth(np.full(40, 1e-6), 1e-7) == ""
    assert growth(np.where(np.arange(40) < 30, 1e-7, 1e-2), 1e-6).startswith("right until position 30")


def test_logits_of_one_position_only_are_not_enough() -> None:
    logits, _ = Small("no decay", ALL).run()
    assert explain(Evidence(WEIGHTS, WEIGHTS, "fp32", FP32, TOKENS, logits=logits[-1:])).kind == UNKNOWN
