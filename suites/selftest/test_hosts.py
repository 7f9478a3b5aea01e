"""``--hardware HOST``: the same cells on another machine, over a real sshd on loopback."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.store import read
from suites.selftest.conftest import Done
from suites.selftest.wheels import NUMPY, this_numpy

Bench = Callable[..., Done]

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh-keygen") is None, reason="no sshd on this machine; install openssh-server"
)


#: Environment variable of what runs over a box's connections.
MARK = "RWKV_BENCH_TEST_BOX"


class Box:
    """An sshd of our own and an inventory that names it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.ssh = ["ssh", "-p", str(port), "-i", str(folder / "user"), "-o", "BatchMode=yes"]
        self.ssh += [
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            f"UserKnownHostsFile={folder / 'known'}",
            "-o",
            "LogLevel=ERROR",
        ]
        self.ssh.append(f"{getpass.getuser()}@127.0.0.1")
        self.server: subprocess.Popen[bytes] | None = None

    def over(self, settings: str = "") -> list[str]:
        """ssh that sets variables there: ``settings``, and a mark of its own, since other tests may run."""
        forward = f'for last; do :; done; exec {" ".join(self.ssh)} "{self.mark} {settings} $last"'
        return ["sh", "-c", forward, "sh"]

    @property
    def mark(self) -> str:
        return f"{MARK}={self.port}"

    def start(self) -> None:
        assert SSHD is not None
        config = self.folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder / 'host'}\n"
            f"AuthorizedKeysFile {self.folder / 'user.pub'}\nStrictModes no\nPermitRootLogin yes\nUsePAM no\n"
            f"PidFile {self.folder / 'pid'}\n"
        )
        self.server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        pytest.fail("sshd does not answer")

    def inventory(self, **hosts: dict[str, Any]) -> Path:
        path = self.folder / "rwkv-bench.toml"
        lines = []
        for name, changes in hosts.items():
            keys = {"ssh": self.over(), "hardware": "boxcpu", "interpreter": sys.executable, **changes}
            lines += [f"[hosts.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        path.write_text("\n".join(lines) + "\n")
        return path

    def connections(self) -> list[psutil.Process]:
        """The server's processes that serve a connection."""
        assert self.server is not None
        found: list[psutil.Process] = psutil.Process(self.server.pid).children(recursive=True)
        return found


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("sshd")
    for key in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd confines itself; packages make it at boot
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = Box(folder, port)
    served.start()
    yield served
    assert served.server is not None
    for process in served.connections():
        process.kill()
    served.server.kill()
    served.server.wait()


@pytest.fixture
def inventory(box: Box, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def write(**hosts: dict[str, Any]) -> None:
        monkeypatch.setenv("RWKV_BENCH_INVENTORY", str(box.inventory(**(hosts or {"box": {}}))))

    return write


def rows_of(done: Done) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(done.out)["rows"]
    return rows


def ours(box: Box) -> list[psutil.Process]:
    """Processes that were started over the box's connections and go on."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(box.port) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def gone(box: Box, seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while ours(box) and time.monotonic() < limit:
        time.sleep(0.05)
    return not ours(box)


QUICK = ("--hardware", "box", "--quick", "--threads", "1", "--format", "json")


def test_cells_run_there_and_say_so(
    inventory: Callable[..., None], box: Box, small: str, bench: Bench, state: Path
) -> None:
    inventory()
    done = bench("--model", small, "--backend", "numpy", "--quant", "fp32", *QUICK)
    assert done.code == 0, done.err
    rows = rows_of(done)
    assert {row["metric"] for row in rows} >= {"parity", "state_parity", "prefill", "decode", "load"}
    assert {row["verdict"] for row in rows} == {"PASS"}
    assert all(row["hardware"] == "boxcpu" and row["hardware_detail"]["host"] == "box" for row in rows)
    assert all(row["isolated"] for row in rows)
    assert "--hardware box" in rows[0]["command"]
    assert [row.metric for row in read(state / "rows.jsonl")] == [row["metric"] for row in rows]
    assert gone(box)


def test_a_model_is_pushed_once(
    inventory: Callable[..., None], box: Box, small: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    inventory(box={"ssh": box.over(f"RWKV_BENCH_CACHE={there}")})
    parity = ("parity", "--model", small, "--backend", "numpy", "--quant", "fp32", *QUICK[:2], *QUICK[3:])
    assert bench(*parity).code == 0
    (pushed,) = (there / "models").iterdir()
    assert pushed.read_bytes() == Path(small).read_bytes()
    before = pushed.stat().st_mtime_ns
    assert bench(*parity).code == 0
    assert pushed.stat().st_mtime_ns == before


def test_an_adapter_file_of_the_users_goes_along(
    inventory: Callable[..., None], small: str, bench: Bench, tmp_path: Path
) -> None:
    inventory()
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\nimport reference\nfrom backends.api import BackendInfo\nfrom reference import Arithmetic\n"
        "INFO = BackendInfo('mine', 'd', 'o', ('cpu',), {'fp32': Arithmetic()})\n"
        "class S:\n    def __init__(self, w): self.w = w.in_memory(np.float32)\n"
        "    def forward(self, tokens, state): return reference.forward(self.w, tokens, state)\n"
        "def load(checkpoint, scheme, device, threads): return S(checkpoint)\n"
    )
    done = bench("parity", "--model", small, "--backend", str(file), *QUICK[:2], *QUICK[3:])
    assert (done.code, rows_of(done)[0]["verdict"]) == (0, "PASS")


@pytest.mark.parametrize(
    ("fault", "verdict", "words"),
    [
        ("segfault", "CRASHED", "killed by SIGSEGV during forward; last words: deadly: about to read address 0"),
        ("exit", "CRASHED", "exited with status 0 without an answer during forward"),
        ("busy", "TIMEOUT", "no sign of life for 3 s during forward"),
    ],
)
def test_what_dies_there_is_a_row_here(
    fault: str, verdict: str, words: str, inventory: Callable[..., None], box: Box, small: str, bench: Bench
) -> None:
    inventory()
    options = ("--backend", "deadly,numpy", "--quant", "fp32", "--device", f"{fault},cpu", "--timeout", "3")
    done = bench("parity", "--model", small, *options, "--hardware", "box,local", "--threads", "1", "--format", "json")
    rows = {
        row["backend"]: row for row in rows_of(done) if row["backend"] == "numpy" or row["verdict"] != "UNSUPPORTED"
    }
    assert rows["numpy"]["verdict"] == "PASS"
    assert done.code == 4
    assert gone(box)
    bad = [row for row in rows_of(done) if row["verdict"] == verdict]
    assert bad
    assert words in bad[0]["reason"]


@pytest.mark.parametrize("fault", ["sleep", "busy"])
def test_a_connection_that_is_lost_ends_one_cell(
    fault: str, inventory: Callable[..., None], box: Box, small: str, bench: Bench, state: Path
) -> None:
    """Earlier rows are on disk, the next cell runs, and nothing is left running there, not even a busy loop."""
    inventory()

    def cut() -> None:
        limit = time.monotonic() + 30
        while time.monotonic() < limit:
            stored = state / "rows.jsonl"
            if stored.exists() and "time_to_first_token" in stored.read_text():
                time.sleep(0.5)
                for process in box.connections():
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=cut)
    thread.start()
    options = ("--backend", "deadly", "--device", f"late-{fault},noise", "--threads", "1", "--timeout", "40")
    done = bench("--model", small, "--hardware", "box", *options, "--format", "json")
    thread.join()
    rows = rows_of(done)
    lost = [row for row in rows if row["verdict"] == "CRASHED"]
    assert lost, done.err
    assert "the connection was lost during decode" in lost[0]["reason"]
    assert rows[-1]["verdict"] == "PASS"
    assert done.code == 4
    assert gone(box)


def test_noise_before_the_first_frame_is_skipped(
    inventory: Callable[..., None], box: Box, small: str, bench: Bench
) -> None:
    """What a login shell prints."""
    noisy = ["sh", "-c", 'printf "Welcome to box\\n\\223RB1 motd \\377"; exec "$@"', "sh", *box.over()]
    inventory(box={"ssh": noisy})
    assert bench("parity", "--model", small, "--backend", "numpy", "--quant", "fp32", *QUICK[:2], *QUICK[3:]).code == 0


@pytest.mark.slow
def test_environments_are_built_there(
    inventory: Callable[..., None], box: Box, small: str, bench: Bench, tmp_path: Path
) -> None:
    """What a run there lacks it says, with the command; setup builds it there, and the run finds it."""
    wheels, there = tmp_path / "wheels", tmp_path / "there"
    wheels.mkdir()
    this_numpy(wheels)
    settings = f"RWKV_BENCH_CACHE={there} PIP_NO_INDEX=1 PIP_FIND_LINKS={wheels}"
    inventory(box={"ssh": box.over(settings)})
    file = tmp_path / "mine.py"
    file.write_text(
        f'# /// script\n# dependencies = ["{NUMPY}"]\n# ///\n'
        "import reference\nfrom backends.api import BackendInfo\nfrom reference import Arithmetic\n"
        "INFO = BackendInfo('mine', 'd', 'o', ('cpu',), {'fp32': Arithmetic()})\n"
        "class S:\n    def __init__(self, w): self.w = w\n"
        "    def forward(self, tokens, state): return reference.forward(self.w, tokens, state)\n"
        "def load(checkpoint, scheme, device, threads):\n    import sys\n"
        "    assert 'environments' in sys.prefix\n    return S(checkpoint)\n"
    )
    parity = ("parity", "--model", small, "--backend", str(file), *QUICK[:2], *QUICK[3:])
    done = bench(*parity)
    assert done.code == 3
    assert f"rwkv-bench setup {file} --hardware box" in rows_of(done)[0]["reason"]
    done = bench("setup", str(file), "--hardware", "box")
    assert (done.code, "ready on box, Python 3." in done.err) == (0, True), done.err
    done = bench(*parity)
    assert (done.code, rows_of(done)[0]["verdict"]) == (0, "PASS")
    done = bench("setup", str(file), "--hardware", "bax")
    assert (done.code, "did you mean 'box'" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ssh": ["ssh", "-p", "1", "-o", "BatchMode=yes", "nobody@127.0.0.1"]}, "Connection refused"),
        ({"interpreter": "no-such-python"}, "no-such-python"),
        ({"ssh": ["no-such-ssh", "box"]}, "no-such-ssh"),
    ],
)
def test_a_host_that_cannot_be_reached_is_3_and_one_line(
    changes: dict[str, Any], words: str, inventory: Callable[..., None], small: str, bench: Bench
) -> None:
    inventory(box=changes)
    done = bench("parity", "--model", small, "--backend", "numpy", "--quant", "fp32", *QUICK[:2], *QUICK[3:])
    assert done.code == 3
    (row,) = rows_of(done)
    assert row["verdict"] == "UNAVAILABLE"
    assert "box cannot be reached" in row["reason"]
    assert words in row["reason"]
    assert "\n" not in row["reason"]
