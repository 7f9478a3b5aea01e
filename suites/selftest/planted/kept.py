"""Results kept in a file as they come: a run of hours that is interrupted goes on where it was.

One JSON object a line: ``key`` says what was run, on which code, and the rest what came of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from suites.selftest.planted.clean import Clean
from suites.selftest.planted.trial import Outcome, Trial
from suites.selftest.planted.visible import Effect

_In = TypeVar("_In", Trial, Clean)
_Out = TypeVar("_Out")

#: Under the repository's root: what is judged, what judges it, and the backends of the clean runs.
ROOT = Path(__file__).resolve().parents[3]
_SOURCES = (
    *("reference", "harness", "suites/selftest/planted"),
    *("backends/api.py", "backends/index.py", "backends/shared", "backends/numpy_reference.py", "backends/torch_eager"),
)

#: Runs what it is given, and gives the results in order.
Run = Callable[[Sequence[_In]], Iterator[_Out]]


def read(path: Path | None) -> dict[str, Any]:
    """Key -> what came of it. A last line that was cut off is left out."""
    found: dict[str, Any] = {}
    if path is None or not path.exists():
        return found
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = entry["found"]
    return found


def outcomes(path: Path | None, planned: Sequence[Trial], shows: str, run: Run[Trial, Outcome]) -> Iterator[Outcome]:
    """The outcome of every trial; only what the file has not is run."""
    known = read(path)
    todo = [trial for trial in planned if _key(trial, shows) not in known]
    fresh = run(todo)
    for trial in planned:
        key = _key(trial, shows)
        if key in known:
            yield outcome(trial, known[key])
            continue
        found = next(fresh)
        _append(path, key, asdict(found) | {"effect": found.effect._asdict()})
        yield found


def alarms(path: Path | None, planned: Sequence[Clean], run: Run[Clean, str]) -> Iterator[str]:
    """What is said of every clean run; empty: nothing."""
    known = read(path)
    fresh = run([one for one in planned if _key(one) not in known])
    for one in planned:
        key = _key(one)
        if key in known:
            yield known[key]
            continue
        said = next(fresh)
        _append(path, key, said)
        yield said


def known(path: Path | None, planned: Sequence[_In], *more: str) -> list[_In]:
    """Those of the runs that the file has; ``more``: what else is in their key."""
    found = read(path)
    return [one for one in planned if _key(one, *more) in found]


def outcome(trial: Trial, found: dict[str, Any]) -> Outcome:
    """What was kept, as it was."""
    places = {how: None if at is None else (at[0], at[1]) for how, at in found["found"].items()}
    return Outcome(
        trial, found["place"], found["layer"], Effect(**found["effect"]), found["by"], places, found["seconds"]
    )


def _key(run: Trial | Clean, *more: str) -> str:
    return "|".join([type(run).__name__, *(str(value) for value in asdict(run).values()), *more, source()])


@lru_cache(maxsize=1)
def source() -> str:
    """Hash of the code that is judged, and of what judges it: what other code has given is not ours."""
    digest = hashlib.sha256(f"numpy {version('numpy')}, torch {_torch()}".encode())
    for file in files():
        digest.update(file.relative_to(ROOT).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def files() -> list[Path]:
    """The sources that results come from."""
    found: set[Path] = set()
    for place in _SOURCES:
        path = ROOT / place
        found |= {path} if path.is_file() else set(path.rglob("*.py"))
    return sorted(found)


def _torch() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"


def _append(path: Path | None, key: str, found: Any) -> None:
    if path is not None:
        with path.open("a") as file:  # the line break first: what was cut off before stays a line of its own
            file.write("\n" + json.dumps({"key": key, "found": found}))
