"""Which commit a measurement is of, for the history in reports."""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache
from pathlib import Path

#: Says it where the folder does not: a runtime that was built elsewhere.
VARIABLE = "RWKV_BENCH_REVISION"

#: Digits of a commit's name.
DIGITS = 10

_DESCRIBE = ("describe", "--always", "--exclude=*", "--dirty", f"--abbrev={DIGITS}")


def revision() -> str | None:
    """RWKV_BENCH_REVISION, else the commit of the git checkout that this folder is in, else GITHUB_SHA, else ``None``.

    A checkout with changes that are not committed ends in ``-dirty``.
    """
    return os.environ.get(VARIABLE) or of_checkout(Path.cwd()) or os.environ.get("GITHUB_SHA", "")[:DIGITS] or None


@lru_cache(maxsize=4)
def of_checkout(folder: Path) -> str | None:
    """As it is when first asked; ``None`` outside of a checkout, before its first commit, and without git."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *_DESCRIBE],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
