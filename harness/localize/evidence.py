"""What is known about a fault once its place is known: what a cause is concluded from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from backends.api import Session
from reference.numerics import Arithmetic
from reference.weights import Weights

#: Opens the backend under test over other weights of the same scheme (truncated, rescaled).
Opener = Callable[[Weights], AbstractContextManager[Session]]


@dataclass(frozen=True)
class Evidence:
    """One fault.

    stored      the weights as the scheme stores them, dequantized; ``original`` before that
    arithmetic  that the backend declares
    tokens      the prompt ``(T,)``, from the initial state
    point       full name of the first wrong trace point, ``None`` where only a layer or nothing is known
    layer       of it; ``None`` for the embedding, the head, or unknown
    inputs      what the backend's operation was given, by full trace point name, as the backend shows it (or,
                where it shows less, as follows from what it shows), each ``(T, width)``
    got         what it made of them, ``(T, width)``
    expected    what it should have made of them, float64
    logits      ``(T, n_vocab)`` of the backend, and ``truth`` of the reference, where all positions are known
    state       the backend's canonical state after the prompt, if it shows one, and ``truth_state``
    """

    original: Weights
    stored: Weights
    scheme: str
    arithmetic: Arithmetic
    tokens: np.ndarray
    point: str | None = None
    layer: int | None = None
    inputs: Mapping[str, np.ndarray] | None = None
    got: np.ndarray | None = None
    expected: np.ndarray | None = None
    logits: np.ndarray | None = None
    truth: np.ndarray | None = None
    state: np.ndarray | None = None
    truth_state: np.ndarray | None = None
