"""Names of the blobs that go into the exported graph and come out of it: the trace points' own."""

from __future__ import annotations

from reference.config import Config
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS

_ATT = ("att.xk", "att.xv", "att.xr", "att.k", "att.v", "att.r", "att.wkv", "att.rwkv", "att.out", "att.residual")
_FFN = ("ffn.xk", "ffn.xr", "ffn.k", "ffn.k2", "ffn.v", "ffn.r", "ffn.out", "ffn.residual")
#: Outputs that are state and no trace points.
_SUMS = ("att.aa", "att.bb", "att.pp")


def trace_points(config: Config) -> list[str]:
    """Names of the trace points that are in the graph, in execution order: all but ``emb``."""
    names = ["blocks.0.ln0"]
    for i in range(config.n_layer):
        names += [f"blocks.{i}.{point}" for point in ("ln1", *_ATT, "ln2", *_FFN)]
    return [*names, "ln_out", "logits"]


def output_names(config: Config) -> list[str]:
    """Names of all outputs in the order in which the module returns them."""
    return [*trace_points(config), *(f"blocks.{i}.{row}" for i in range(config.n_layer) for row in _SUMS)]


def state_outputs(config: Config) -> list[str]:
    """The outputs that are the new state: layer by layer, rows in canonical order."""
    rows = {FFN_X: "ln2", ATT_X: "ln1", AA: "att.aa", BB: "att.bb", PP: "att.pp"}
    return [f"blocks.{i}.{rows[row]}" for i in range(config.n_layer) for row in sorted(rows)]


def input_names(config: Config) -> list[str]:
    """The embedding, then the old state: layer by layer, rows in canonical order."""
    return ["emb", *(f"blocks.{i}.state.{row}" for i in range(config.n_layer) for row in STATE_ROWS)]


def wkv_parts(config: Config) -> list[tuple[list[str], list[str]]]:
    """Per layer, what enters the WKV recurrence and what leaves it."""
    parts = []
    for i in range(config.n_layer):
        at, state = f"blocks.{i}.att.", f"blocks.{i}.state."
        entering = [at + "k", at + "v", state + "aa", state + "bb", state + "pp"]
        parts.append((entering, [at + "wkv", *(f"blocks.{i}.{row}" for row in _SUMS)]))
    return parts
