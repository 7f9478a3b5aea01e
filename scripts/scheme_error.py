"""How far a scheme moves the logits, and by what: its stored weights, the arithmetic a backend declares, both.

    python scripts/scheme_error.py bigdl-llm [--model 169m] [--quant sym_int4,sym_int8]

RMS over 48 positions against float64 on the fp32 weights, in units of the logits' spread over the vocabulary
(:func:`harness.compare.spread`); and the mean KL divergence of both. By the reference alone: no backend runs.
"""

from __future__ import annotations

import argparse

import numpy as np

from backends.index import load_backend
from harness.budget import hold
from harness.compare import kl_divergence, logits_error
from harness.models import gate_tokens, open_model
from harness.run import GATE_TOKENS
from harness.without_codec import has_codec
from reference.forward import forward
from reference.schemes import apply


def main() -> None:
    """One line a scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--quant", help="comma list; default: every scheme of the backend with a codec")
    options = parser.parse_args()
    info, model = load_backend(options.backend).INFO, open_model(options.model)
    names = options.quant.split(",") if options.quant else [name for name in info.schemes if has_codec(name)]
    tokens = gate_tokens(model, GATE_TOKENS)
    full = hold(model.weights)
    exact, _ = forward(full, tokens, all_logits=True, dtype=np.float64)
    print(f"{options.model}\n{'scheme':<14}{'weights':>10}{'arithmetic':>12}{'both':>10}{'KL of both':>12}")
    for name in names:
        stored, arithmetic = hold(apply(model.weights, name)), info.arithmetic(name, "cpu")
        kept, _ = forward(stored, tokens, all_logits=True, dtype=np.float64)
        both, _ = forward(stored, tokens, all_logits=True, arithmetic=arithmetic, seed=0)
        errors = [logits_error(*pair, None).rms for pair in ((kept, exact), (both, kept), (both, exact))]
        cells = [f"{100 * error:.2f} %" for error in errors]
        print(f"{name:<14}{cells[0]:>10}{cells[1]:>12}{cells[2]:>10}{kl_divergence(both, exact):>12.2g}", flush=True)


if __name__ == "__main__":
    main()
