"""Two checkouts of one git repository side by side: BASE in a temporary folder, HEAD there too or as it stands.

CheckoutError (InputError)    no repository, no such revision, a command that failed; one line
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import harness
from harness.revision import of_checkout
from reference.errors import InputError

BASE, HEAD = "base", "head"


class CheckoutError(InputError):
    """A checkout that cannot be had, in one line."""


@dataclass(frozen=True)
class Side:
    """One side: its folder, what it is called in reports, the interpreter, and where modules are looked for.

    harness   the folder whose ``harness`` measures: the checkout itself where it is of this project, else ours
    commit    short, as rows name it (:mod:`harness.revision`)
    """

    name: str
    root: Path
    revision: str
    python: str
    paths: tuple[str, ...]
    harness: str
    commit: str | None = None


@contextmanager
def checkouts(repository: Path, base: str, head: str | None, pythons: tuple[str, str]) -> Iterator[tuple[Side, Side]]:
    """Both sides for the length of the block; what was added to the repository is taken back however it ends.

    head   a revision; ``None``: the working tree as it stands, changes that are not committed included
    """
    top = top_of(repository)
    wanted = [(BASE, base), *([(HEAD, head)] if head is not None else [])]
    commits = {name: _commit(top, revision) for name, revision in wanted}
    with tempfile.TemporaryDirectory(prefix="rwkv-bench-ab-") as folder:
        added: list[Path] = []
        try:
            roots = {HEAD: top}
            for name, revision in wanted:
                roots[name] = Path(folder) / name
                added.append(roots[name])
                _git(top, "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", "--force",
                     str(roots[name]), commits[name])  # fmt: skip
                commits[name] = f"{revision} ({commits[name][:10]})"
            said = commits.get(HEAD, "working tree")
            both = _side(BASE, roots[BASE], commits[BASE], pythons[0]), _side(HEAD, roots[HEAD], said, pythons[1])
            yield replace(both[0], commit=of_checkout(roots[BASE])), replace(both[1], commit=of_checkout(roots[HEAD]))
        finally:
            for root in added:
                _quietly(top, "worktree", "remove", "--force", str(root))
            _quietly(top, "worktree", "prune")


def top_of(repository: Path) -> Path:
    """The top folder of the working tree that a folder is in. Raises CheckoutError."""
    if not repository.is_dir():
        raise CheckoutError(f"--repository {repository}: there is no such folder")
    return Path(_git(repository, "rev-parse", "--show-toplevel"))


def is_this_project(root: Path) -> bool:
    """Whether a checkout is of rwkv-bench itself, so that everything is to come from it."""
    return (root / "harness" / "session.py").is_file() and (root / "backends" / "api.py").is_file()


def within(side: Side, top: Path, backend: str) -> str:
    """A backend as this side has it: a name, or the file at the same place in its checkout.

    Raises CheckoutError for a file outside of the repository, which would be the same on both sides.
    """
    if not backend.endswith(".py"):
        return backend
    file = Path(backend).resolve()
    try:
        place = file.relative_to(top.resolve())
    except ValueError:
        raise CheckoutError(f"--backend {backend}: not in {top}; both sides would run the same file") from None
    if not (side.root / place).is_file():
        raise CheckoutError(f"--backend {backend}: {side.name} ({side.revision}) has no {place}")
    return str(side.root / place)


def prepare(side: Side, command: str) -> None:
    """Run a command of the user's in a checkout, as a build; raises CheckoutError with its last line."""
    done = subprocess.run(command, shell=True, cwd=side.root, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no output"]
        raise CheckoutError(f"--setup failed in {side.name} ({side.revision}), status {done.returncode}: {last[0]}")


def _side(name: str, root: Path, revision: str, python: str) -> Side:
    ours = str(Path(str(harness.__file__)).parents[1])
    own = is_this_project(root)
    return Side(name, root, revision, python, (str(root),) if own else (str(root), ours), str(root) if own else ours)


def _commit(top: Path, revision: str) -> str:
    try:
        return _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except CheckoutError:
        raise CheckoutError(f"no revision {revision!r} in {top}; `git log` and `git branch -a` name some") from None


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CheckoutError("git is not installed; ab needs it for its checkouts") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise CheckoutError(f"git {words[0]} in {folder}: {last[0]}")
    return done.stdout.strip()


def _quietly(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False)
