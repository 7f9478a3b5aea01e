"""Where derived files live: truths, content hashes, converted checkpoints, environments; all of it can be deleted."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``RWKV_BENCH_CACHE``, else ``rwkv-bench`` in the user's cache folder."""
    root = os.environ.get("RWKV_BENCH_CACHE")
    return Path(root) if root else user_folder("XDG_CACHE_HOME", ".cache")


def user_folder(variable: str, below_home: str) -> Path:
    """``rwkv-bench`` in an XDG folder; a user without a home has one in the temporary folder."""
    root = os.environ.get(variable, "")
    if os.path.isabs(root):  # the specification says to ignore a relative one
        return Path(root) / "rwkv-bench"
    try:
        return Path.home() / below_home / "rwkv-bench"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"rwkv-bench-{os.getuid()}" / Path(below_home).name
