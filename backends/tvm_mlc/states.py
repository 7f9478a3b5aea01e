"""A state as a library keeps it: tensors that a step returns anew, or MLC-LLM's caches that it writes to.

MLC-LLM kept RWKV's state in the objects of its attention cache, one row each, which ``prefill`` and ``decode``
update in place. A state here is never written to, so those are filled from a copy before a step and copied after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backends.tvm_mlc.library import runtime


class Tensors:
    """States of our libraries: what a step returned, which nobody writes to again."""

    def __init__(self, vm: Any) -> None:
        self.initial = vm["create_kv_cache"]()
        self.dtypes = [str(row.dtype) for row in self.initial]

    def enter(self, state: Any) -> Any:
        """What an entry point takes."""
        return state

    def leave(self, returned: Any) -> Any:
        """A state from what an entry point returned."""
        return returned

    def rows(self, state: Any) -> list[np.ndarray]:
        """Its rows ``(n_embd,)``, in MLC's order."""
        return [row.numpy()[0] for row in state]

    def state(self, rows: Sequence[np.ndarray]) -> Any:
        """The state of rows; each is cast to the type that the library keeps it in."""
        tensor = runtime().runtime.tensor
        return runtime().runtime.convert(
            [tensor(np.ascontiguousarray(row[None].astype(t))) for row, t in zip(rows, self.dtypes)]
        )


class Caches(Tensors):
    """States of MLC-LLM's libraries: copies of what its caches held. The caches themselves are scratch."""

    def __init__(self, vm: Any, width: int) -> None:
        tvm = runtime()
        self._caches = vm["create_kv_cache"]()
        view = tvm.get_global_func("vm.builtin.attention_kv_cache_view")
        self._update = tvm.get_global_func("vm.builtin.attention_kv_cache_update")
        shape = tvm.runtime.ShapeTuple([1, width])
        self._view: Callable[[Any], Any] = lambda cache: view(cache, shape)
        self.initial = self.leave(self._caches)
        self.dtypes = [str(row.dtype) for row in self.initial]

    def enter(self, state: Any) -> Any:
        for cache, row in zip(self._caches, state):
            self._update(cache, row)
        return self._caches

    def leave(self, returned: Any) -> Any:
        rows = []
        for cache in returned:
            row = self._view(cache)
            copy = runtime().runtime.empty(row.shape, str(row.dtype), row.device)
            row.copyto(copy)
            rows.append(copy)
        return rows
