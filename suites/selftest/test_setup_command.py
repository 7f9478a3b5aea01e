"""``rwkv-bench setup``: real environments from wheels made by hand; a run uses them and never builds one."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness.isolation import environments
from suites.selftest.conftest import Done
from suites.selftest.processes import Place, eventually, signalled
from suites.selftest.wheels import NUMPY, this_numpy, wheel

Bench = Callable[..., Done]

#: A file of somebody else's; ``theirs`` is importable in its environment only.
MINE = f"""\
# /// script
# requires-python = ">=3.9"
# dependencies = ["theirs==1.0", "{NUMPY}"]
# ///
\"\"\"The reference, in an environment of its own.\"\"\"

from __future__ import annotations

import reference
from backends.api import BackendInfo
from reference.numerics import Arithmetic

INFO = BackendInfo("mine", "the reference", "me", ("cpu",), {{"fp32": Arithmetic()}})


class Session:
    def __init__(self, weights):
        self.weights = weights

    def forward(self, tokens, state):
        return reference.forward(self.weights, tokens, state)


def version():
    import theirs

    return theirs.VERSION


def load(checkpoint, scheme, device, threads):
    import theirs

    theirs.begin()
    return Session(checkpoint)
"""
THEIRS = "import sys\nVERSION = 'theirs 1.0'\n\n\ndef begin():\n    assert sys.prefix != sys.base_prefix\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Folders, and wheels in place of an index."""
    made = Place(tmp_path_factory.mktemp("setup"))
    wheels = made.temporary.parent / "wheels"
    wheels.mkdir()
    this_numpy(wheels)
    wheel(wheels, "theirs", "1.0", {"theirs.py": THEIRS})
    made.environment.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=wheels.as_uri(), PIP_NO_CACHE_DIR="1")
    return made


@pytest.fixture(scope="module")
def mine(place: Place) -> Path:
    path = place.temporary.parent / "my backends" / "mine.py"
    path.parent.mkdir()
    path.write_text(MINE)
    assert len(MINE.splitlines()) < 60
    return path


@pytest.fixture(scope="module")
def built(place: Place, mine: Path, small: str) -> list[str]:
    """What setup said; two of them at once, after a run that found nothing built."""
    before = place.run("parity", "--backend", str(mine), "--model", small, "--store", str(place.store))
    assert before.returncode == 3
    assert f"not built; rwkv-bench setup {mine}" in before.stdout
    assert folders(place) == []
    both = [place.start("setup", str(mine)) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return said


def folders(place: Place) -> list[Path]:
    """Environments, whole or not."""
    root = Path(place.environment["RWKV_BENCH_CACHE"]) / "environments"
    return [path for path in root.glob("*") if path.is_dir()]


def test_a_file_gets_its_environment_once(built: list[str], place: Place) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}."
    for said in built:
        assert f"mine.py: ready, theirs 1.0, Python {version}" in said
        assert said.count("\n") == 1
    (folder,) = folders(place)
    ready = json.loads((folder / "ready.json").read_text())
    assert "theirs==1.0" in ready["lock"]
    assert ready["python"].startswith(version)
    assert place.left() == []


def test_it_runs_there(built: list[str], place: Place, mine: Path, small: str) -> None:
    done = place.run("--backend", str(mine), "--model", small, "--quick", "--threads", "1", "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = {row["metric"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["parity"]["verdict"] == "PASS"
    assert rows["decode"]["value"] > 0
    assert (rows["decode"]["isolated"], rows["decode"]["backend_version"]) == (True, "theirs 1.0")


def test_it_is_not_built_again(built: list[str], place: Place, mine: Path) -> None:
    (folder,) = folders(place)
    before = (folder / "ready.json").stat().st_mtime_ns
    assert place.run("setup", str(mine)).returncode == 0
    assert ((folder / "ready.json").stat().st_mtime_ns, folders(place)) == (before, [folder])


def test_asked_to_run_here_it_says_what_is_missing(built: list[str], place: Place, mine: Path, small: str) -> None:
    done = place.run("parity", "--backend", str(mine), "--model", small, "--in-process")
    assert done.returncode == 4
    assert "No module named 'theirs'" in done.stdout


def test_a_run_never_installs(
    built: list[str], place: Place, mine: Path, small: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is ready, nor what needs setup, nor what another pin makes need it."""
    started: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", lambda command, *_: started.append(command))
    monkeypatch.setenv("RWKV_BENCH_CACHE", place.environment["RWKV_BENCH_CACHE"])
    assert bench("parity", "--backend", str(mine), "--model", small).code == 0
    other = mine.with_name("other.py")
    other.write_text(MINE.replace("theirs==1.0", "theirs==1.1"))
    for argv in (("parity", "--backend", str(other), "--model", small), ("list", "backends"), ("--dry-run",)):
        bench(*argv)
    done = bench("parity", "--backend", str(other), "--model", small)
    assert done.code == 3
    assert "rwkv-bench setup" in done.out
    assert (started, len(folders(place))) == ([], 1)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (('">=3.9"', '">=3.99"'), 3, "mine needs Python >=3.99, and none was found here"),
        (('"theirs==1.0"', '"theirs=="'), 2, "theirs=="),
        (("# dependencies", "# dependency"), 2, "did you mean 'dependencies'?"),
        (("import reference\n", "import nowhere\n"), 2, "importing it raised ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    change: tuple[str, str], code: int, words: str, tmp_path: Path, bench: Bench
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE.replace(*change))
    done = bench("setup", str(path))
    assert (done.code, done.err.count("\n")) == (code, 1), done.err
    assert words.replace("mine needs", f"{path} needs") in done.err


def test_a_backend_without_a_header_needs_nothing(bench: Bench) -> None:
    done = bench("setup", "numpy")
    assert (done.code, done.out) == (0, "")
    assert "numpy: needs no environment of its own" in done.err
    assert bench("setup", "nunpy").code == 2


def test_list_says_what_needs_setup(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path / "empty"))
    found = json.loads(bench("list", "backends", "--format", "json").out)["backends"]
    status = {record["name"]: record["status"] for record in found}
    assert status["numpy"] == "ready"
    assert "rwkv-bench setup transformers" in status["transformers"]


@pytest.fixture
def silent_index() -> Iterator[str]:
    """An index that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple"


@pytest.mark.slow
def test_one_killed_in_the_middle_is_never_used_and_built_anew(
    place: Place, mine: Path, small: str, silent_index: str, tmp_path: Path
) -> None:
    """And where that fails: pip's error in one line, 3, nothing left."""
    path = mine.with_name("greedy.py")
    path.write_text(MINE.replace("theirs==1.0", "no-such-thing==9"))
    there = Place(tmp_path)
    there.environment.update(PIP_INDEX_URL=silent_index, PIP_NO_CACHE_DIR="1")
    process = there.start("setup", str(path))
    assert eventually(lambda: installers(there), 60)
    signalled(process, signal.SIGKILL)
    (folder,) = folders(there)
    # The installer lives on, and holds the lock, until it wants to say something.
    for orphan in installers(there):
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
    before = (folder / "pyvenv.cfg").stat().st_mtime_ns
    done = there.run("parity", "--backend", str(path), "--model", small)
    assert done.returncode == 3
    assert "not built" in done.stdout
    assert (folder / "pyvenv.cfg").stat().st_mtime_ns == before
    there.environment.update({name: place.environment[name] for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS")})
    done = there.run("setup", str(path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert "not available: install failed with status 1: ERROR: Could not find a version" in done.stderr
    assert "no-such-thing==9" in done.stderr
    assert folders(there) == []


def installers(place: Place, what: str = "install") -> list[psutil.Process]:
    """Processes that make an environment (``what`` is ``venv``) or install into one in the cache of ``place``."""
    root = place.environment["RWKV_BENCH_CACHE"]
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except (psutil.Error, OSError):
            continue
        if what in words and any(word.startswith(root) for word in words):
            found.append(process)
    return found


@pytest.mark.parametrize("what", ["venv", "ensurepip", "install"])
def test_ctrl_c_ends_the_installer_and_leaves_nothing(what: str, mine: Path, silent_index: str, tmp_path: Path) -> None:
    """As soon as it is there, and with temporary files of its own."""
    there = Place(tmp_path)
    there.environment.update(PIP_INDEX_URL=silent_index, PIP_NO_CACHE_DIR="1")
    process = there.start("setup", str(mine))
    assert eventually(lambda: installers(there, what), 60)
    assert signalled(process, signal.SIGINT) < 20
    assert (process.returncode, installers(there, what), folders(there), there.left()) == (130, [], [], [])


README = Path(__file__).parents[2] / "README.md"

#: The runtime that the README's example drives: half-precision weights, read from the file it was given.
RUNTIME = """\
from reference import forward, load_checkpoint


class Model:
    def __init__(self, path):
        self.weights = load_checkpoint(path)

    def run(self, tokens, state):
        return forward(self.weights, tokens, state)


def load(path, threads):
    return Model(path)
"""


@pytest.mark.slow
def test_the_file_of_the_readme_with_an_environment_runs(place: Place, small: str) -> None:
    """As shown, but for the runtime, which stands in for somebody's, and for where numpy comes from."""
    found = re.search(r"```python\n(# /// script.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert len(found[1].splitlines()) < 60
    file = place.temporary.parent / "theirs.py"
    file.write_text(found[1].replace('"numpy"', f'"{NUMPY}"'), encoding="utf-8")
    wheel(place.temporary.parent / "wheels", "rwkv_runtime", "1.0", {"rwkv_runtime.py": RUNTIME})
    done = place.run("setup", str(file))
    assert done.returncode == 0, done.stderr
    done = place.run("--backend", str(file), "--model", small, "--quick", "--threads", "1", "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = {row["metric"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["parity"]["verdict"] == "PASS"
    assert rows["decode"]["isolated"]
    assert rows["decode"]["value"] > 0
