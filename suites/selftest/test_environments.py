"""Environments are found by what they hold, built once, and never half-built."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from pathlib import Path

import pytest

from backends.api import Unavailable
from harness.isolation import environments
from harness.isolation.environments import READY, build, find
from harness.isolation.requirements import Requirements

OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"
WANTED = Requirements("", ("something==1.0",), ())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("RWKV_BENCH_ENVIRONMENTS", raising=False)
    return tmp_path / "environments"


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Installing takes a moment and a file; the folders that were installed to."""
    seen: list[Path] = []

    def install(folder: Path, python: Path, *_: object) -> None:
        seen.append(folder)
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)
        time.sleep(0.2)
        (folder / READY).write_text(json.dumps({"python": platform.python_version(), "lock": ["a==1"]}))

    monkeypatch.setattr(environments, "_install", install)
    return seen


def quiet(line: str) -> None:
    """Progress that nobody reads."""


def test_what_is_not_built_says_how_to_build_it(cache: Path) -> None:
    with pytest.raises(Unavailable, match="not built; rwkv-bench setup mine"):
        find("mine", WANTED)
    assert not cache.exists()


def test_built_once_and_found_afterwards(installs: list[Path]) -> None:
    first = build("mine", WANTED, quiet)
    assert (build("mine", WANTED, quiet), find("mine", WANTED)) == (first, first)
    assert (first.version, first.lock, len(installs)) == (platform.python_version(), ("a==1",), 1)


@pytest.mark.parametrize(
    "changed",
    [
        Requirements("", ("something==1.1",), ()),
        Requirements("", ("something==1.0",), ("more==1",)),
        Requirements(">=3.9", ("something==1.0",), ()),
    ],
)
def test_other_requirements_are_another_environment(changed: Requirements, installs: list[Path]) -> None:
    build("mine", WANTED, quiet)
    with pytest.raises(Unavailable, match="not built"):
        find("mine", changed)
    build("mine", changed, quiet)
    assert len(set(installs)) == 2
    assert find("mine", WANTED) != find("mine", changed)


def test_two_setups_at_once_build_once(installs: list[Path]) -> None:
    said: list[str] = []
    made: list[environments.Environment] = []
    threads = [threading.Thread(target=lambda: made.append(build("mine", WANTED, said.append))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(installs), len(set(made)), len(made)) == (1, 1, 4)
    assert set(said) == {"waiting for another setup of the same"}


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"python": "3.11"}', '{"python": "3.11", "lock": 3}'])
def test_a_half_built_one_is_never_used_and_built_anew(content: str | None, installs: list[Path]) -> None:
    build("mine", WANTED, quiet)
    folder = installs[0]
    (folder / "rest of a wheel").touch()
    if content is None:
        (folder / READY).unlink()
    else:
        (folder / READY).write_text(content)
    with pytest.raises(Unavailable, match="not built"):
        find("mine", WANTED)
    build("mine", WANTED, quiet)
    assert len(installs) == 2
    assert not (folder / "rest of a wheel").exists()


def test_one_whose_interpreter_is_gone_is_built_anew(installs: list[Path]) -> None:
    build("mine", WANTED, quiet)
    (installs[0] / "bin" / "python").unlink()
    (installs[0] / "bin" / "python").symlink_to("/no/such/python")
    with pytest.raises(Unavailable, match="not built"):
        find("mine", WANTED)
    build("mine", WANTED, quiet)
    assert len(installs) == 2


@pytest.mark.parametrize("error", [environments.SetupFailed("no"), KeyboardInterrupt(), OSError("disk full")])
def test_an_attempt_that_fails_leaves_nothing(
    error: BaseException, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(folder: Path, *_: object) -> None:
        folder.mkdir(parents=True)
        raise error

    monkeypatch.setattr(environments, "_install", install)
    with pytest.raises(type(error)):
        build("mine", WANTED, quiet)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_another_python_is_looked_for(installs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_places", lambda version: [Path(f"/pythons/{version}")])
    monkeypatch.setattr(environments, "_version", lambda python: f"{python.name}.4")
    other = "3.12" if OWN != "3.12" else "3.10"
    wanted = Requirements(f"=={other}.4", (), ())
    assert next(environments._interpreters(wanted)) == (other, Path(f"/pythons/{other}"))
    assert list(environments._interpreters(Requirements(f"=={other}.3", (), ()))) == []
    assert next(environments._interpreters(Requirements("", (), ())))[0] == OWN


def test_a_release_may_be_pinned_exactly(installs: list[Path]) -> None:
    wanted = Requirements(f"=={platform.python_version()}", (), ())
    build("mine", wanted, quiet)
    assert find("mine", wanted).version == platform.python_version()


@pytest.mark.parametrize(
    ("python", "words"),
    [
        (">=3.9,<3.11", "mine needs Python >=3.9,<3.11, and none was found here; install Python 3.9 or 3.10"),
        ("==3.12.1", "mine needs Python ==3.12.1, and none was found here; install Python 3.12"),
        (">=4", "mine needs Python >=4, and none was found here"),
    ],
)
def test_a_python_that_is_not_here_is_named(python: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_places", lambda version: [])
    wanted = Requirements(python, (), ())
    with pytest.raises(Unavailable) as found:
        find("mine", wanted)
    with pytest.raises(Unavailable) as built:
        build("mine", wanted, quiet)
    assert (str(found.value), str(built.value)) == (words, words)


def test_a_shim_that_runs_nothing_is_no_python(tmp_path: Path) -> None:
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    assert environments._version(shim) == ""
    assert environments._version(tmp_path / "no such file") == ""


def test_a_name_cannot_leave_the_folder(cache: Path) -> None:
    for name in ("../../etc", "a/b.py", "", "Größe", "x" * 200):
        assert environments._folder(name, WANTED, OWN).parent == cache


def test_the_installer_keeps_the_lock(tmp_path: Path) -> None:
    """Killed with SIGKILL, this process leaves an installer at work: nobody may build beside it."""
    with environments._locked(tmp_path / "folder", quiet) as lock:
        code = f"import os; print(os.fstat({lock}).st_ino)"
        said = environments._run([sys.executable, "-c", code, "venv"], lock, quiet)
        assert int(said) == os.fstat(lock).st_ino
