"""The session under test, opened again after it has crashed."""

from __future__ import annotations

import contextlib
import os
import traceback
from contextlib import ExitStack
from types import TracebackType

import numpy as np

import harness
import reference
from backends.api import Declaring, Session
from harness.isolation.child import ChildDied, ChildTimedOut
from harness.isolation.remote import RemoteError
from harness.localize.bench import Bench
from harness.localize.evidence import Opener
from harness.names import one_line
from reference.numerics import Arithmetic
from reference.weights import Weights

#: Where what calls a backend is: exceptions that pass no other file are our own.
_OURS = tuple(os.path.dirname(str(package.__file__)) + os.sep for package in (harness, reference, np, contextlib))


def from_backend(error: Exception) -> bool:
    """Whether an exception came out of the backend: of the isolated one by its type, else by where it was raised."""
    if isinstance(error, (ChildDied, ChildTimedOut, RemoteError)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return any(not frame.filename.startswith(_OURS) for frame in frames)


def told(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {one_line(str(error))}"


class Held:
    """One session at a time over one model; opened when it is first wanted."""

    def __init__(self, opener: Opener, weights: Weights) -> None:
        self._opener, self._weights = opener, weights
        self._open: tuple[ExitStack, Session] | None = None
        self._told: Arithmetic | None = None

    def arithmetic(self, declared: Arithmetic) -> Arithmetic:
        """What the open session says of itself where it knows better than what its backend has ``declared``."""
        session = self.session
        if isinstance(self._opener, Bench):
            return self._told or declared
        return session.declared_arithmetic() if isinstance(session, Declaring) else declared

    @property
    def session(self) -> Session:
        """The open session. Raises what opening it raises."""
        if self._open is None:
            stack = ExitStack()
            if isinstance(self._opener, Bench):
                opened = stack.enter_context(self._opener.open(self._weights))
                self._open, self._told = (stack, opened.session), opened.arithmetic
            else:
                self._open = stack, stack.enter_context(self._opener(self._weights))
        return self._open[1]

    def drop(self, error: Exception | None = None) -> None:
        """Close it, because ``error`` came out of it or because it is not needed for a while.

        What closing one raises that has crashed already is told by nobody: its crash is.
        """
        if self._open is None:
            return
        (stack, _), self._open = self._open, None
        try:
            stack.close()
        except Exception:
            if error is None:
                raise

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop(error if isinstance(error, Exception) else None)
