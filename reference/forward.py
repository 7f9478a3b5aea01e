r"""RWKV-4 in numpy: the ground truth. Everything else in this project is compared with this file.

Paper: "RWKV: Reinventing RNNs for the Transformer Era", https://arxiv.org/abs/2305.13048
Official code: https://github.com/BlinkDL/ChatRWKV/blob/main/RWKV_in_150_lines.py

Symbols, the paper's (shapes: T tokens, C = n_embd, F = n_ffn, V = n_vocab):

    x (T, C)     residual stream                    mu_k, mu_v, mu_r (C)  token-shift mixing weights
    r (T, C)     receptance, a gate in (0, 1)       w (C) > 0   decay per token; checkpoints store
    k, v (T, C)  key, value                                     time_decay = ln w
    aa, bb (C)   numerator and denominator of WKV   u (C)       bonus of the current token (time_first)
    pp (C)       the exponent both are divided by   W_* (out, in)

Deliberate differences from the official code: a whole prompt is one call, each matrix product taken
over all T tokens; in WKV all that does not depend on the previous step is taken out of the loop; no
weight is divided by ``rescale_every``, because float32 does not overflow and the function is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Union

import numpy as np

from reference.config import Config
from reference.errors import TokenError
from reference.mixed import Mixed, emulated
from reference.numerics import Arithmetic, Exact, Op
from reference.weights import Tensor, Weights

Tap = Callable[[str, np.ndarray], None]
Tokens = Union[Sequence[int], np.ndarray]  # noqa: UP007 - evaluated at run time, on Python 3.9 too

LN_EPS = 1e-5
PP_START = -1e30

#: Rows of the canonical state of one layer.
FFN_X, ATT_X, AA, BB, PP = range(5)
STATE_ROWS = ("ffn_x", "att_x", "aa", "bb", "pp")


def initial_state(config: Config, dtype: Any = np.float32) -> np.ndarray:
    """State before the first token: ``(n_layer, 5, n_embd)``, zero but for ``pp`` = -1e30.

    With empty sums any pp stands for the same state, but not in floating point: against a pp of 0 the
    exponential of a very negative first key underflows, and WKV becomes 0 / 0.
    """
    state = np.zeros((config.n_layer, 5, config.n_embd), dtype=dtype)
    state[:, PP] = PP_START
    return state


def forward(
    weights: Weights,
    tokens: Tokens,
    state: np.ndarray | None = None,
    *,
    tap: Tap | None = None,
    all_logits: bool = False,
    dtype: Any = np.float32,
    arithmetic: Arithmetic | Mixed | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Run ``tokens`` from ``state`` (``None``: from the start) and return ``(logits, new state)``.

    logits  ``(n_vocab,)`` after the last token; ``(T, n_vocab)`` with ``all_logits``
    state   ``(n_layer, 5, n_embd)``; the one passed in is not changed
    tap     called with every trace point's name and array ``(T, width)``, in execution order
    dtype   float32, or float64 for truth
    arithmetic, seed   emulate a declared arithmetic instead; see :mod:`reference.numerics`, :mod:`reference.mixed`

    Raises :class:`TokenError` for an empty prompt or an id outside the vocabulary.
    """
    op: Op = emulated(arithmetic, seed) if arithmetic else Exact(dtype)
    config = weights.config
    ids = check_tokens(tokens, config.n_vocab)
    state = initial_state(config, op.dtype) if state is None else np.array(state, dtype=op.dtype)
    tap = tap or _no_tap

    # An emulated fp16 overflows to Inf and then NaN, which is the result asked for, not a warning.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        x = op.at("emb").residual(weights["emb.weight"].rows(ids, op.dtype))  # (T, C)
        tap("emb", x)
        x = op.at("blocks.0.ln0").residual(layer_norm(x, weights, "blocks.0.ln0", op))
        tap("blocks.0.ln0", x)
        for i in range(config.n_layer):
            block = f"blocks.{i}."
            h = layer_norm(x, weights, block + "ln1", op)
            tap(block + "ln1", h)
            add = op.at(block + "att.residual").residual
            x = add(x + time_mix(h, weights, block + "att.", state[i], op, tap))
            tap(block + "att.residual", x)
            h = layer_norm(x, weights, block + "ln2", op)
            tap(block + "ln2", h)
            add = op.at(block + "ffn.residual").residual
            x = add(x + channel_mix(h, weights, block + "ffn.", state[i], op, tap))
            tap(block + "ffn.residual", x)
        # The head is the largest matrix: one position is enough unless somebody looks at the others.
        watched = tap is not _no_tap
        x = layer_norm(x if all_logits or watched else x[-1:], weights, "ln_out", op)
        tap("ln_out", x)
        head = op.at("logits")
        logits = head.linear(x if all_logits else x[-1:], weights["head.weight"])  # (T or 1, V)
        if watched:  # after that, for one row alone may be added up in another order, and watching changes nothing
            tap("logits", logits if all_logits else head.linear(x, weights["head.weight"]))
    return (logits if all_logits else logits[-1]), state


def time_mix(h: np.ndarray, weights: Weights, at: str, state: np.ndarray, op: Op, tap: Tap) -> np.ndarray:
    """Attention's place in RWKV (the paper's time mixing): ``h (T, C)`` = ln1(x) -> ``(T, C)``.

    Reads and writes rows att_x, aa, bb, pp of ``state (5, C)``.
    """
    shifted = np.concatenate([state[ATT_X][None], h[:-1]])  # h of the token before
    state[ATT_X] = h[-1]
    xk = mix(h, shifted, vector(weights, at + "time_mix_k", op), op.at(at + "xk"))  # (T, C)
    xv = mix(h, shifted, vector(weights, at + "time_mix_v", op), op.at(at + "xv"))
    xr = mix(h, shifted, vector(weights, at + "time_mix_r", op), op.at(at + "xr"))
    tap(at + "xk", xk)
    tap(at + "xv", xv)
    tap(at + "xr", xr)

    k = op.at(at + "k").linear(xk, weights[at + "key.weight"])
    v = op.at(at + "v").linear(xv, weights[at + "value.weight"])
    r = gate(xr, weights[at + "receptance.weight"], op.at(at + "r"))
    tap(at + "k", k)
    tap(at + "v", v)
    tap(at + "r", r)

    w = np.exp(vector(weights, at + "time_decay", op))
    u = vector(weights, at + "time_first", op)
    y, (state[AA], state[BB], state[PP]) = wkv(k, v, w, u, WkvState(*state[AA : PP + 1]), op.at(at + "wkv"))
    y = op.at(at + "wkv").act(y)
    tap(at + "wkv", y)
    y = op.at(at + "rwkv").act(r * y)
    tap(at + "rwkv", y)
    out = op.at(at + "out").linear(y, weights[at + "output.weight"])
    tap(at + "out", out)
    return np.asarray(out)


class WkvState(NamedTuple):
    """Sums over the past, both divided by e^pp: ``aa`` of e^k v, ``bb`` of e^k. Each ``(C,)``."""

    aa: np.ndarray
    bb: np.ndarray
    pp: np.ndarray


def wkv(
    k: np.ndarray, v: np.ndarray, w: np.ndarray, u: np.ndarray, past: WkvState, op: Op
) -> tuple[np.ndarray, WkvState]:
    """The recurrence (the paper's WKV), exact for any size of k: ``k, v (T, C)`` -> ``(T, C)``.

        wkv_t = (sum_{i<t} e^{-(t-1-i)w + k_i} v_i + e^{u+k_t} v_t)
              / (sum_{i<t} e^{-(t-1-i)w + k_i}     + e^{u+k_t}    )

    Numerator and denominator are kept divided by e^pp, pp being the largest exponent so far
    (the paper's numerically stable form). pp does not depend on the sums, so it is found for all t first; then every
    exponential is taken at once; what is left for the second loop is one multiply and one add.
    """
    n_tokens, width = k.shape
    pp = np.empty((n_tokens + 1, width), dtype=k.dtype)
    pp[0] = past.pp
    for t in range(n_tokens):  # pp_t = max(pp_{t-1} - w, k_t)
        np.maximum(op.wkv(pp[t] - w), k[t], out=pp[t + 1])

    decay = op.wkv(np.exp(op.wkv(pp[:-1] - w - pp[1:])))  # e^{pp_{t-1} - w - pp_t}
    gain = op.wkv(np.exp(op.wkv(k - pp[1:])))  # e^{k_t - pp_t}
    added = np.stack([op.wkv(gain * v), gain], axis=1)  # (T, 2, C): to aa, to bb
    sums = np.empty((n_tokens + 1, 2, width), dtype=k.dtype)
    sums[0] = past.aa, past.bb
    for t in range(n_tokens):
        sums[t + 1] = op.wkv(op.wkv(decay[t] * sums[t]) + added[t])

    aa, bb = sums[:-1, 0], sums[:-1, 1]  # before token t
    uk = op.wkv(u + k)
    top = np.maximum(pp[:-1], uk)
    old = op.wkv(np.exp(op.wkv(pp[:-1] - top)))
    new = op.wkv(np.exp(op.wkv(uk - top)))
    numerator = op.wkv(op.wkv(old * aa) + op.wkv(new * v))
    denominator = op.wkv(op.wkv(old * bb) + new)
    return op.wkv(numerator / denominator), WkvState(sums[-1, 0], sums[-1, 1], pp[-1])


def channel_mix(h: np.ndarray, weights: Weights, at: str, state: np.ndarray, op: Op, tap: Tap) -> np.ndarray:
    """The feed-forward half of a block (the paper's channel mixing): ``h (T, C)`` = ln2(x) -> ``(T, C)``."""
    shifted = np.concatenate([state[FFN_X][None], h[:-1]])
    state[FFN_X] = h[-1]
    xk = mix(h, shifted, vector(weights, at + "time_mix_k", op), op.at(at + "xk"))
    xr = mix(h, shifted, vector(weights, at + "time_mix_r", op), op.at(at + "xr"))
    tap(at + "xk", xk)
    tap(at + "xr", xr)
    k = op.at(at + "k").linear(xk, weights[at + "key.weight"])  # (T, F)
    tap(at + "k", k)
    k2 = op.at(at + "k2").act(np.square(np.maximum(k, 0)))  # squared ReLU
    tap(at + "k2", k2)
    v = op.at(at + "v").linear(k2, weights[at + "value.weight"])  # (T, C)
    tap(at + "v", v)
    r = gate(xr, weights[at + "receptance.weight"], op.at(at + "r"))
    tap(at + "r", r)
    out = op.at(at + "out").act(r * v)
    tap(at + "out", out)
    return np.asarray(out)


def mix(h: np.ndarray, shifted: np.ndarray, mu: np.ndarray, op: Op) -> np.ndarray:
    """Token shift: ``mu * h_t + (1 - mu) * h_{t-1}``, each product rounded."""
    return np.asarray(op.act(op.act(h * mu) + op.act(shifted * op.act(1 - mu))))


def layer_norm(x: np.ndarray, weights: Weights, at: str, op: Op) -> np.ndarray:
    """LayerNorm over channels, with its statistics in the full precision of ``op.dtype``."""
    op = op.at(at)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + op.dtype.type(LN_EPS))
    return np.asarray(op.act(x * vector(weights, at + ".weight", op) + vector(weights, at + ".bias", op)))


def gate(x: np.ndarray, weight: Tensor, op: Op) -> np.ndarray:
    """Receptance: the logistic function of a matrix product, ``x (T, K)`` -> ``(T, N)``."""
    return np.asarray(op.act(sigmoid(op.linear(x, weight))))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function; e^-x overflowing to Inf for very negative x gives the right answer, 0."""
    return np.asarray(1 / (1 + np.exp(-x)))


def check_tokens(tokens: Tokens, n_vocab: int) -> np.ndarray:
    """Token ids as int64 ``(T,)``; raises :class:`TokenError` if empty or outside the vocabulary."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0:
        raise TokenError("the prompt has no tokens; at least one is needed")
    if ids.dtype.kind in "Of" and all(isinstance(token, int) for token in tokens):  # one is beyond int64
        ids = np.array([min(max(int(token), -1), n_vocab) for token in tokens])
    if ids.dtype.kind not in "iu":
        raise TokenError(f"token ids must be integers, not {ids.dtype}")
    bad = np.flatnonzero((ids < 0) | (ids >= n_vocab))
    if bad.size:
        raise TokenError(f"token {tokens[bad[0]]} at position {bad[0]} is outside the vocabulary of {n_vocab}")
    return ids.astype(np.int64)


def vector(weights: Weights, name: str, op: Op) -> np.ndarray:
    """A vector of the checkpoint in the compute type of ``op``."""
    return weights[name].array(op.dtype)


def _no_tap(name: str, array: np.ndarray) -> None:
    pass
