"""Which test launches which Triton kernel: named beside the test, held against what it does, and none left out."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.interpreter import InterpretedFunction

import backends.triton_cuda

#: Kernel -> the tests that launch it.
TESTS: dict[str, list[str]] = {}


def of(*kernels: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test launches these kernels and no others; a run of it that does not fails."""

    def named(test: Callable[..., None]) -> Callable[..., None]:
        for kernel in kernels:
            TESTS.setdefault(kernel, []).append(test.__name__)

        @functools.wraps(test)
        def run(*given: Any, **named: Any) -> None:
            seen: set[str] = set()
            usual = InterpretedFunction.run

            def record(self: Any, *arguments: Any, **options: Any) -> Any:
                seen.add(self.fn.__name__)
                return usual(self, *arguments, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(InterpretedFunction, "run", record)
                test(*given, **named)
            assert seen, f"{test.__name__} launches no kernel"
            assert seen <= set(kernels), f"{test.__name__} launches {seen - set(kernels)} as well"

        return run

    return named


def kernels() -> set[str]:
    """Every kernel of the backend: what is compiled and not called by another, in each of its files of kernels."""
    found: set[str] = set()
    called: set[str] = set()
    for file in sorted(Path(str(backends.triton_cuda.__file__)).parent.glob("kernels_*.py")):
        module = import_module(f"backends.triton_cuda.{file.stem}")
        for name, value in vars(module).items():
            if isinstance(value, InterpretedFunction):
                found.add(name)
                tree = ast.parse(inspect.getsource(value.fn))
                calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
                called |= {call.id for call in calls if isinstance(call, ast.Name)}
    return found - called
