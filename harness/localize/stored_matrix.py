"""A stored matrix taken apart into groups, steps and codes, whatever the format.

In every scheme here a value is (code - zero) x step, or code x step + minimum, with one step for a group of
neighbours. So a wrong order of nibbles permutes the values within a group, a zero point too high by one takes one step
from each, and the step itself is the least distance between two values of the group, or a whole part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harness.localize.part import Unknown


@dataclass(frozen=True)
class Stored:
    """A matrix ``(N, K)`` as a scheme stores it, dequantized.

    original  before that
    group     neighbours along a row that share a step; 0: none
    levels    how far codes reach on their longer side, whose sign that of the step decides; 0: no such sign
    eight     codes have eight bits
    """

    values: np.ndarray
    original: np.ndarray
    group: int
    levels: int = 0
    eight: bool = False

    @cached_property
    def groups(self) -> np.ndarray:
        """``(N, G, group)``, a last group that is short filled up with zeros."""
        if not self.group:
            raise Unknown("groups")
        n, k = self.values.shape
        padded = np.pad(self.values, [(0, 0), (0, -k % self.group)])
        return padded.reshape(n, -1, self.group)

    def flat(self, groups: np.ndarray) -> np.ndarray:
        """Groups back to ``(N, K)``."""
        return groups.reshape(len(groups), -1)[:, : self.values.shape[1]]

    @cached_property
    def step(self) -> np.ndarray:
        """What one more of a code is worth, ``(N, G, 1)``; 1 in a group with one value only."""
        ordered = np.sort(self.groups.astype(np.float64), axis=-1)
        gaps = np.diff(ordered, axis=-1)
        largest = np.abs(ordered).max(axis=-1, keepdims=True)
        least = np.where(gaps > 1e-4 * largest, gaps, np.inf).min(axis=-1, keepdims=True)
        found = np.full_like(least, np.nan)
        for parts in range(1, 9):  # the least distance seen may be a few steps
            steps = gaps / (least / parts)
            whole = (np.abs(steps - np.round(steps)) < 0.03).all(axis=-1, keepdims=True)
            found = np.where(np.isnan(found) & whole & np.isfinite(least), least / parts, found)
        for reach in (127, 128):  # of eight bits, where no two values need be neighbours
            steps = self.groups / (largest / reach)
            whole = (np.abs(steps - np.round(steps)) < 0.03).all(axis=-1, keepdims=True)
            found = np.where(whole & self.eight & (largest > 0), largest / reach, found)
        found = np.where(np.isfinite(found), found, 1.0)
        if self.levels:
            reach = np.round(self.groups.max(axis=-1, keepdims=True) / found)
            found = np.where(reach == self.levels, -found, found)
        return np.asarray(found)

    @cached_property
    def low(self) -> np.ndarray:
        """Least value of each group, ``(N, G, 1)``."""
        return np.asarray(self.groups.min(axis=-1, keepdims=True))
