"""Measured rates of this machine: asked of a process of its own, kept until the machine or its libraries change.

A processor is measured in a fresh interpreter that has as many threads as the cells have; a graphics device or
another host in the process of the backend that is measured there, and a graphics device anew in every run.

Needs only the standard library and numpy, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.machine.facts import allowed_cpus, facts
from reference.cache import cache_folder

#: Seconds after which a probe is given up.
TIMEOUT_SECONDS = 120

#: By which thread pools that are built at import are told their size.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

Measured = dict[str, Any]


class ProbeFailed(Exception):
    """A probe that told nothing; one line."""


def cpu_rates(threads: int, cpus: str | None = None, again: bool = False, higher: bool = False) -> Measured:
    """What :func:`harness.machine.work.measure_cpu` finds here, kept. Raises :class:`ProbeFailed`.

    ``cpus`` is what the cells are bound to; ``again`` and ``higher`` as in :func:`kept`.
    """
    key, cache = _cpu_key(threads, cpus), facts().cpu.last_level_bytes or 0
    higher = higher or (not again and _disturbed(known_rates(key)))
    return kept(key, lambda: _in_a_child(threads, cache, cpus), again, higher)


def known_cpu_rates(threads: int, cpus: str | None = None) -> Measured | None:
    """What :func:`cpu_rates` has kept; measures nothing."""
    return known_rates(_cpu_key(threads, cpus))


def _cpu_key(threads: int, cpus: str | None) -> dict[str, Any]:
    found = facts()
    return {
        "machine": [found.cpu.name, found.memory_bytes, dict(found.cpu.caches), found.system],
        "limits": [found.limits.cpus],
        "threads": threads,
        "cpus": cpus,
        "versions": {name: _version(name) for name in ("numpy", "torch")},
    }


def _disturbed(known: Measured | None) -> bool:
    """Whether a kept measurement was taken while others worked on every CPU, and now they do not."""
    if known is None or not hasattr(os, "getloadavg"):
        return False
    load = float(known.get("load", 0.0))
    return load > allowed_cpus() and os.getloadavg()[0] < load / 2


def _best(new: Measured, old: Measured) -> Measured:
    """The higher of two rates each: what disturbs only ever slows."""
    flops = {
        kind: max(new["flops"].get(kind, 0.0), old["flops"].get(kind, 0.0)) for kind in {**old["flops"], **new["flops"]}
    }
    return {**new, "read_bytes_per_s": max(new["read_bytes_per_s"], old["read_bytes_per_s"]), "flops": flops}


def kept(
    key: Mapping[str, Any], measure: Callable[[], Measured], again: bool = False, higher: bool = False
) -> Measured:
    """``measure()``, or what it gave before for the same key; ``again`` asks anew and keeps that.

    ``higher`` asks anew too, and keeps the higher of both for each rate.
    """
    path = _path(key)
    known = _read(path)
    if known is not None and not (again or higher):
        return known
    taken = _sound(measure())
    taken["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    taken["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if higher and known is not None:
        taken = _best(taken, known)
    _write(path, {"key": dict(key), "taken": taken})
    return taken


#: Of devices, as this process has measured them.
_OF_THIS_RUN: dict[str, Measured] = {}


def of_this_run(key: Mapping[str, Any], measure: Callable[[], Measured], higher: bool = False) -> Measured:
    """The same for this process alone: what clocks and heat allow a device today is not what they did last month."""
    name = json.dumps(key, sort_keys=True)
    known = _OF_THIS_RUN.get(name)
    if known is None or higher:
        taken = _sound(measure())
        _OF_THIS_RUN[name] = taken if known is None else _best(taken, known)
    return _OF_THIS_RUN[name]


def _sound(taken: Measured) -> Measured:
    rates = [taken["read_bytes_per_s"], *taken["flops"].values()]
    if not all(isinstance(rate, float) and math.isfinite(rate) and rate > 0 for rate in rates):
        raise ProbeFailed("the probe gave rates that are no rates")
    return taken


def known_rates(key: Mapping[str, Any]) -> Measured | None:
    """What is kept for a key; measures nothing."""
    return _read(_path(key))


def _in_a_child(threads: int, cache: int, cpus: str | None) -> Measured:
    root = os.fspath(Path(__file__).parents[2])
    told = {**os.environ, **dict.fromkeys(_THREADS, str(threads)), "PYTHONPATH": root}
    command = [sys.executable, "-m", "harness.machine.work", str(threads), str(cache), *([cpus] if cpus else [])]
    try:
        done = subprocess.run(
            command, env=told, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True, cwd=root
        )
        found: Measured = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        raise ProbeFailed(f"the probe ended with {error.returncode}: {error.stderr.strip()[-200:]}") from None
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ProbeFailed(f"the probe did not run: {error}") from None
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _path(key: Mapping[str, Any]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return cache_folder() / "probe" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> Measured | None:
    """A kept measurement; ``None`` for none or a damaged one, which is then measured again."""
    try:
        taken: Measured = json.loads(path.read_text(encoding="utf-8"))["taken"]
        whole = isinstance(taken["flops"], dict) and taken["read_bytes_per_s"] > 0 and "last_level_bytes" in taken
        return taken if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all; a cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, path)
    except OSError:
        return
