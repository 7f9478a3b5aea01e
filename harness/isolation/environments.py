"""Environments of backends that need their own: found, built once, never half-built, never built by a run.

One folder per set of requirements and Python, named by its content; ``ready.json``, written last, makes it
usable and says what is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from backends.api import Unavailable
from harness.isolation import leftovers
from harness.isolation.requirements import Requirements
from reference.cache import cache_folder

try:
    import fcntl
except ImportError:  # a system without it: do not build twice at once
    fcntl = None  # type: ignore[assignment]

#: Raise it when environments are built in another way: those of older versions are then left alone.
RECIPE = 1

READY = "ready.json"

#: Called with one line of progress.
Tell = Callable[[str], None]


class SetupFailed(Unavailable):
    """An environment could not be built; one line with the installer's last words."""


@dataclass(frozen=True)
class Environment:
    """A usable environment: its interpreter, that one's version, and the packages installed in it."""

    python: Path
    version: str
    lock: tuple[str, ...]


def find(name: str, wanted: Requirements) -> Environment:
    """The environment of a backend; raises Unavailable, saying what to do, where there is none."""
    for version in _candidates(wanted):
        environment = _ready(_folder(name, wanted, version))
        if environment is not None:
            return environment
    if next(_interpreters(wanted), None) is None:
        raise _no_python(name, wanted)
    raise Unavailable(f"{name} runs in an environment of its own, which is not built", f"rwkv-bench setup {name}")


def build(name: str, wanted: Requirements, tell: Tell) -> Environment:
    """Build the environment unless it is there. Raises Unavailable or SetupFailed."""
    with suppress(Unavailable):
        return find(name, wanted)
    found = next(_interpreters(wanted), None)
    if found is None:
        raise _no_python(name, wanted)
    version, python = found
    folder = _folder(name, wanted, version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder, tell) as lock:
        environment = _ready(folder)
        if environment is not None:  # somebody else has built it meanwhile
            return environment
        shutil.rmtree(folder, ignore_errors=True)  # a half-built one
        try:
            _install(folder, python, wanted, lock, tell)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        environment = _ready(folder)
        assert environment is not None
        return environment


def _install(folder: Path, python: Path, wanted: Requirements, lock: int, tell: Tell) -> None:
    """With the pip that comes with that Python: a newer one would be a download that no header pins."""
    tell(f"python {_version(python)} -m venv")
    _run([str(python), "-m", "venv", str(folder)], lock, tell)
    pip = [str(_python(folder)), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    if wanted.dependencies:
        _run([*pip, "install", *wanted.dependencies], lock, tell)
    if wanted.no_deps:
        _run([*pip, "install", "--no-deps", "--no-cache-dir", *wanted.no_deps], lock, tell)
    installed = _run([*pip, "freeze", "--all"], lock, lambda line: None).splitlines()
    ready = {
        "python": _version(python),
        "lock": sorted(installed),
        "requirements": vars(wanted),
        "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    part = folder / f".{READY}"
    part.write_text(json.dumps(ready, indent=1), encoding="utf-8")
    os.replace(part, folder / READY)


def _run(command: list[str], lock: int, tell: Tell) -> str:
    """Run one installer; its lines are progress. Raises :class:`SetupFailed` with its last words.

    It holds the lock as well: should this process be killed, nobody builds the folder anew while the
    installer still writes into it.
    """
    leftovers.sweep()
    private = leftovers.Folder()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    lines: list[str] = []
    process: subprocess.Popen[str] | None = None
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, "TMPDIR": str(private.path)},
            pass_fds=(lock,),
            start_new_session=True,
            text=True,
            errors="replace",
        )
        private.mark(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            tell(lines[-1].strip())
        code = process.wait()
    except BaseException:
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        raise
    finally:
        private.remove()  # and what the installer has started; itself, where it had no time to become ``process``
    if code != 0:
        said = [line for line in lines if re.match(r"(ERROR|error)", line)] or [line for line in lines if line][-1:]
        what = next(word for word in command if word in ("venv", "install", "freeze"))
        raise SetupFailed(f"{what} failed with status {code}: {' | '.join(said[:2])[:400]}")
    return "\n".join(lines)


def _ready(folder: Path) -> Environment | None:
    try:
        content = json.loads((folder / READY).read_text(encoding="utf-8"))
        version, lock = str(content["python"]), tuple(str(line) for line in content["lock"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    python = _python(folder)
    return Environment(python, version, lock) if os.access(python, os.X_OK) else None


def _folder(name: str, wanted: Requirements, version: str) -> Path:
    content = repr((RECIPE, wanted, version, platform.system(), platform.machine()))
    slug = re.sub(r"[^a-z0-9]+", "-", Path(name).stem.lower() if name.endswith(".py") else name.lower()).strip("-")
    root = os.environ.get("RWKV_BENCH_ENVIRONMENTS")
    return (
        Path(root) if root else cache_folder() / "environments"
    ) / f"{slug}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _candidates(wanted: Requirements) -> list[str]:
    """Versions (major.minor) of which some release will do, our own first."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    versions = dict.fromkeys([own, *_VERSIONS])
    return [version for version in versions if any(wanted.takes(f"{version}.{micro}") for micro in range(_MICROS))]


#: Newest of which anything here is known to work first: wheels of older pins end with some version.
_VERSIONS = tuple(f"3.{minor}" for minor in (11, 12, 10, 13, 14, 9))

#: No release of Python 3 has had more bug-fix releases.
_MICROS = 40


def _interpreters(wanted: Requirements) -> Iterator[tuple[str, Path]]:
    """``(major.minor, interpreter)`` of this machine that will do; our own first."""
    for version in _candidates(wanted):
        for path in _places(version):
            found = _version(path)
            if found.startswith(f"{version}.") and wanted.takes(found):
                yield version, path
                break


def _places(version: str) -> list[Path]:
    """Where a Python of that version may be: our own, on the path, of pyenv, of uv."""
    places = [Path(sys.executable)] if version == f"{sys.version_info[0]}.{sys.version_info[1]}" else []
    on_path = shutil.which(f"python{version}")
    places += [Path(on_path)] if on_path else []
    home = Path(os.path.expanduser("~"))
    for root in (Path(os.environ.get("PYENV_ROOT", home / ".pyenv")) / "versions", home / ".local/share/uv/python"):
        with suppress(OSError):
            places += sorted(root.glob(f"*{version}*/bin/python{version}"))
    return places


@cache
def _version(python: Path) -> str:
    """``3.11.7``, or nothing for what does not run: a shim, a broken link."""
    if str(python) == sys.executable:
        return platform.python_version()
    code = "import platform, venv, ensurepip; print(platform.python_version())"
    try:
        done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _no_python(name: str, wanted: Requirements) -> Unavailable:
    versions = sorted(_candidates(wanted), key=lambda version: int(version[2:]))
    reason = f"{name} needs Python {wanted.python}, and none was found here"
    return Unavailable(reason, f"install Python {' or '.join(versions)}" if versions else "")


@contextmanager
def _locked(folder: Path, tell: Tell) -> Iterator[int]:
    """One builder of a folder at a time; the descriptor that holds the lock."""
    with open(folder.with_suffix(".lock"), "w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                tell("waiting for another setup of the same")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()
