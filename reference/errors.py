"""Errors a user can cause. Each is one line: what, where, what to do.

InputError (ValueError)    anything below
├── CheckpointError        a file that is not a readable RWKV-4 checkpoint
├── ConfigError            a model name or shape that is not RWKV-4
└── TokenError             a prompt that is empty or leaves the vocabulary
"""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, explained in one line."""


class CheckpointError(InputError):
    """A file that is not a readable RWKV-4 checkpoint."""


class ConfigError(InputError):
    """A model name or a shape that is not RWKV-4's."""


class TokenError(InputError):
    """A prompt that is empty or holds an id outside the vocabulary."""


class NonFiniteWeights(UserWarning):
    """A checkpoint that loads but holds NaN or Inf; the message names the tensors."""
