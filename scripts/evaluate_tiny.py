"""Bits per byte of the embedded model on its held-out text, by the reference, state carried throughout.

python scripts/evaluate_tiny.py              the whole text, and its first 24,000 bytes
"""

from __future__ import annotations

import numpy as np

from harness.compare import log_softmax
from harness.models import EMBEDDED, TINY, open_model
from reference.forward import forward

BLOCK = 1000
BEGINNING = 24_000


def main() -> None:
    """Print both figures."""
    weights = open_model(TINY).weights.in_memory()
    text = np.frombuffer((EMBEDDED / "heldout.txt").read_bytes(), np.uint8)
    state, nats = None, 0.0
    for start in range(0, len(text) - 1, BLOCK):
        block = text[start : start + BLOCK]
        logits, state = forward(weights, block, state, all_logits=True)
        following = text[start + 1 : start + 1 + len(block)]
        nats -= float(log_softmax(logits[: len(following)])[np.arange(len(following)), following].sum())
        done = start + len(following)
        if done == BEGINNING or start + BLOCK >= len(text) - 1:
            print(f"{nats / np.log(2) / done:.4f} bits per byte over the first {done} predictions")


if __name__ == "__main__":
    main()
