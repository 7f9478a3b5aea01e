"""A benchmarking and correctness harness for RWKV-4: plan, measure, compare, store.

``harness.open_session`` is the way in for scripts; it is imported when first used, so that
``rwkv-bench list`` pays for nothing it does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.session import open_session

__all__ = ["open_session"]


def __getattr__(name: str) -> Any:
    if name == "open_session":
        from harness.session import open_session

        return open_session
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
