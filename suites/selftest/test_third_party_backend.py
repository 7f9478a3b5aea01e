"""A backend of somebody else: one file, or an installed package; and every way in which it can be wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.index import UnknownBackend, backend_names, load_backend
from suites.selftest.conftest import Done

Bench = Callable[..., Done]
README = Path(__file__).parents[2] / "README.md"

#: A file that is right but for what a test puts in place of a line.
GOOD = re.search(r"```python\n(# mine\.py.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The README's example, in a folder with a space."""
    assert GOOD is not None
    path = tmp_path / "my backends" / "mine.py"
    path.parent.mkdir()
    path.write_text(GOOD.group(1), encoding="utf-8")
    return path


def changed(path: Path, old: str, new: str) -> str:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return str(path)


def test_the_file_of_the_readme_runs(mine: Path, small: str, bench: Bench) -> None:
    assert len(mine.read_text().splitlines()) < 60
    done = bench("--backend", str(mine), "--model", small, "--quick", "--threads", "1", "--format", "json")
    assert done.code == 0
    rows = {row["metric"]: row for row in json.loads(done.out)["rows"]}
    assert rows["parity"]["verdict"] == "PASS"
    assert rows["decode"]["value"] > 0
    assert str(mine) in rows["decode"]["command"].replace("'", "")


def test_a_wrong_kernel_in_it_is_found(mine: Path, small: str, bench: Bench) -> None:
    old = "return reference.forward(self.weights, tokens, state)"
    new = "logits, new = reference.forward(self.weights, tokens, state); return logits * np.float32(1.001), new"
    done = bench("parity", "--backend", changed(mine, old, new), "--model", small)
    assert done.code == 1
    assert "exceeds bound" in done.out


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("    def forward", "    def backward", 4, "AttributeError: 'Session' object has no attribute 'forward'"),
        ("return Session(checkpoint)", "raise RuntimeError('no licence')", 4, "RuntimeError: no licence"),
        ("return Session(checkpoint)", "raise SystemError()", 4, "SystemError"),
        ("return Session(checkpoint)", "return None", 4, "NoneType"),
        ("return reference.forward(self.weights, tokens, state)", "return 1", 4, "TypeError"),
    ],
)
def test_one_that_breaks_while_it_runs_is_4(
    old: str, new: str, code: int, words: str, mine: Path, small: str, bench: Bench
) -> None:
    done = bench("parity", "--backend", changed(mine, old, new), "--model", small)
    assert done.code == code
    assert words in done.out
    assert "Traceback" not in done.err


def test_one_that_says_unavailable_is_3(mine: Path, small: str, bench: Bench) -> None:
    new = "from backends.api import Unavailable; raise Unavailable('no runtime here', 'pip install runtime')"
    done = bench("parity", "--backend", changed(mine, "return Session(checkpoint)", new), "--model", small)
    assert done.code == 3
    assert "UNAVAILABLE: no runtime here; pip install runtime" in done.out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "a backend needs INFO"),
        ("from backends.numpy_reference import INFO\n", "a backend needs INFO"),
        ("INFO = {'name': 'mine'}\ndef load(*_): ...\n", "a backend needs INFO"),
        ("import no_such_runtime\n", "importing it raised ModuleNotFoundError: No module named 'no_such_runtime'"),
        ("def load(:\n", "importing it raised SyntaxError"),
        ("raise SystemExit(0)\n", "importing it raised SystemExit: 0"),
        ("\0", "importing it raised"),
    ],
)
def test_a_file_that_is_no_backend_is_2(text: str, words: str, tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    done = bench("--backend", str(path))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert words in done.err
    assert str(path) in done.err


def test_one_without_schemes_is_2(mine: Path, bench: Bench) -> None:
    done = bench("--backend", changed(mine, 'schemes={"fp32": Arithmetic()}', "schemes={}"))
    assert done.code == 2
    assert "INFO names no schemes" in done.err


def test_a_file_is_imported_once(mine: Path) -> None:
    name = changed(mine, "import numpy as np", "import numpy as np\nprint('imported')")
    assert load_backend(name) is load_backend(name)


@pytest.fixture
def package(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Install a package ``theirs`` that offers the example under a name and a target."""
    site = tmp_path / "site-packages"
    (site / "theirs").mkdir(parents=True)
    (site / "theirs" / "__init__.py").touch()
    (site / "theirs" / "backend.py").write_text(mine.read_text() + "\n\nclass Offer:\n    pass\n")
    changed(site / "theirs" / "backend.py", "class Offer:\n    pass", "class Offer:\n    INFO, load = INFO, load")

    def install(name: str, target: str) -> None:
        info = site / "theirs-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[rwkv_bench.backends]\n{name} = {target}\n")
        monkeypatch.syspath_prepend(str(site))

    return install


@pytest.mark.parametrize("target", ["theirs.backend", "theirs.backend:Offer"])
def test_an_installed_package_is_a_backend_by_name(
    target: str, package: Callable[[str, str], None], small: str, bench: Bench
) -> None:
    package("theirs", target)
    assert backend_names()[-1] == "theirs"
    done = bench("parity", "--backend", "theirs", "--model", small)
    assert done.code == 0
    assert "theirs" in done.out
    assert "theirs" in bench("list", "backends").out


def test_a_broken_package_costs_only_itself(package: Callable[[str, str], None], small: str, bench: Bench) -> None:
    package("theirs", "theirs.gone")
    with pytest.raises(UnknownBackend, match=r"theirs \(theirs\.gone\): importing it raised ModuleNotFoundError"):
        load_backend("theirs")
    assert "importing it raised" in bench("list", "backends").out
    assert bench("parity", "--backend", "theirs", "--model", small).code == 2
    done = bench("--dry-run", "--quant", "fp32", "--model", small)
    assert done.code == 0
    assert "UNAVAILABLE: theirs (theirs.gone)" in done.out
