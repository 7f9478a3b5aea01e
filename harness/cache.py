"""Where measured rows and failure bundles are kept when no option names a file."""

from __future__ import annotations

from pathlib import Path

from reference.cache import user_folder


def state_folder() -> Path:
    """The user's state folder: unlike the cache, what is in it cannot be made again."""
    return user_folder("XDG_STATE_HOME", ".local/state")
