"""Where derived files live: truths, content hashes, failure bundles; all of it can be deleted."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``RWKV_BENCH_CACHE``, else ``rwkv-bench`` in the user's cache folder."""
    root = os.environ.get("RWKV_BENCH_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv-bench"


def state_folder() -> Path:
    """Where measured rows are kept when ``--store`` names no file: the user's state folder."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "rwkv-bench"
