"""Every hypothesis there is for one model."""

from __future__ import annotations

from collections.abc import Collection

from harness.localize.decoder import Decoder
from harness.localize.hypotheses import Hypothesis
from harness.localize.hypotheses_ends import ends, other_layers, vectors
from harness.localize.hypotheses_products import PRODUCTS, elementwise, gates, products
from harness.localize.hypotheses_stream import mixing, norms, residuals
from harness.localize.hypotheses_wkv import kept_rows, recurrences


def operations() -> list[Hypothesis]:
    """Of operations computed wrongly, whatever the weights."""
    return [
        *norms(),
        *mixing(),
        *products(),
        *gates(),
        *recurrences(),
        *elementwise(),
        *residuals(),
        *ends(),
        *other_layers(),
        *vectors(),
    ]


def of_operations(names: Collection[str], decoder: Decoder) -> list[Hypothesis]:
    """Those that change one of these operations; of several at once only where more than one of them is among these.

    Of what is seen of one operation alone, a defect of several is no other than that of the one.
    """
    found = [hypothesis for hypothesis in operations() if _within(hypothesis, names)]
    return found + decoder.hypotheses([name for name in names if name in PRODUCTS or name == "emb"])


def _within(hypothesis: Hypothesis, names: Collection[str]) -> bool:
    shared = sum(name in names for name in hypothesis.computes)
    return shared > 0 and (shared > 1 or len(hypothesis.computes) == 1)


def of_model(decoder: Decoder) -> list[Hypothesis]:
    """All: of single operations, of several, of every matrix, of what the state keeps."""
    return [*operations(), *decoder.hypotheses(["emb", *PRODUCTS]), *decoder.together(), *kept_rows()]
