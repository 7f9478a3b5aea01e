"""How far a scheme moves the logits, and by what: its stored weights, the arithmetic a backend declares, both.

    python scripts/scheme_error.py bigdl-llm [--model 169m] [--quant sym_int4,sym_int8]
    python scripts/scheme_error.py onnx rwkv.cpp --quant Q4_0,ort_int4_g32_asym_int8act --positions 4096

RMS against float64 on the fp32 weights, in units of the logits' spread over the vocabulary
(:func:`harness.compare.spread`); and the mean KL divergence of both, in nats. By the reference alone: no backend runs.

Without --positions on the parity gate's prompt of 48 tokens, a quarter of them drawn from the whole vocabulary: they
decide the KL divergence of a model that has never seen such. With it on so many positions of text (of the held-out
text; random ids for synthetic weights), as `rwkv-bench quality` has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from backends.index import load_backend
from harness.budget import hold
from harness.compare import kl_divergence, logits_error
from harness.models import Model, gate_tokens, open_model
from harness.quality.passage import passage_of
from harness.run import GATE_TOKENS
from harness.without_codec import has_codec
from reference.forward import forward
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.weights import Weights

#: Positions after which the state starts afresh.
_CONTEXT = 128


def main() -> None:
    """One line a scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="+")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--quant", help="comma list, of each backend those it has; default: all with a codec")
    parser.add_argument("--positions", type=int, help="of text; default: the parity gate's prompt")
    options = parser.parse_args()
    model, asked = open_model(options.model), set(options.quant.split(",")) if options.quant else None
    infos = [load_backend(name).INFO for name in options.backend]
    chosen = [(info, name) for info in infos for name in info.schemes if has_codec(name) and _wanted(name, asked)]
    if asked and (unknown := asked - {name for _, name in chosen}):
        parser.error(f"none of {', '.join(options.backend)} has {', '.join(sorted(unknown))} with a codec here")
    texts = _texts(model, options.positions)
    exact = _logits(hold(model.weights), texts)
    print(f"{options.model}, {sum(map(len, texts))} positions")
    print(f"{'scheme':<32}{'weights':>10}{'arithmetic':>12}{'both':>10}{'KL of both':>12}")
    for info, name in chosen:
        stored = hold(apply(model.weights, name))
        kept, both = _logits(stored, texts), _logits(stored, texts, info.arithmetic(name, "cpu"))
        errors = [logits_error(*pair, None).rms for pair in ((kept, exact), (both, kept), (both, exact))]
        cells = [f"{100 * error:.2f} %" for error in errors]
        print(f"{name:<32}{cells[0]:>10}{cells[1]:>12}{cells[2]:>10}{kl_divergence(both, exact):>12.3g}", flush=True)


def _wanted(name: str, asked: set[str] | None) -> bool:
    return asked is None or name in asked


def _texts(model: Model, positions: int | None) -> list[Sequence[int]]:
    """Token ids, each sequence read from the initial state."""
    if positions is None:
        return [gate_tokens(model, GATE_TOKENS)]
    passage = passage_of(model, None, positions, _CONTEXT)
    return [[int(i) for i in passage.ids[call.start : call.stop]] for call in passage.calls(_CONTEXT)]


def _logits(weights: Weights, texts: Sequence[Sequence[int]], arithmetic: Arithmetic | None = None) -> np.ndarray:
    """``(positions, n_vocab)``: in float64, or as an arithmetic has them."""
    runs = [forward(weights, ids, all_logits=True, dtype=np.float64, arithmetic=arithmetic, seed=0)[0] for ids in texts]
    return np.concatenate(runs)


if __name__ == "__main__":
    main()
