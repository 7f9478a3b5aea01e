"""Libraries and params folders that are damaged or another's: at the command line, one line and exit status 2."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import tvm_mlc as backend
from backends.api import Unavailable
from backends.tvm_mlc import native, params
from backends.tvm_mlc.storage import arrays
from harness.cli import main
from harness.isolation import start
from harness.models import open_model
from reference.config import Config
from reference.errors import CheckpointError
from reference.synthetic import synthetic
from suites.parity.test_tvm import compile_to

Change = Callable[[Path], None]

SCHEME = "q4f16_1"

#: What the command ends with.
STATUS = 2


@pytest.fixture(scope="module")
def _environment() -> None:
    try:
        start.environment("tvm", backend)
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def compiled(_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tvm") / "out"
    compile_to(out, "--quant", SCHEME)
    return out


@pytest.mark.usefixtures("_environment")
def test_other_cells_run_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = tmp_path / "no.so"
    library.write_text("no library")
    asked = ["--model", "tiny", "--quant", "q4f16_1", "--library", f"tvm={library}", "--format", "json"]
    assert main(["parity", "--backend", "tvm,numpy", *asked]) == STATUS
    verdicts = {row["backend"]: row["verdict"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert verdicts == {"tvm": "UNSUPPORTED", "numpy": "PASS"}
    assert main(["quality", "--backend", "tvm", "--tokens", "256", *asked]) == STATUS


def refused(folder: Path, capsys: pytest.CaptureFixture[str], scheme: str = SCHEME) -> str:
    """The one thing that the command says of a library, which begins with its path."""
    asked = ["parity", "--model", "tiny", "--backend", "tvm", "--quant", scheme, "--library", f"tvm={folder}"]
    capsys.readouterr()
    status = main(asked)
    out, err = capsys.readouterr()
    assert status == STATUS, (status, out, err)
    assert "Traceback" not in err
    told = {line[line.index(str(folder)) :] for line in err.splitlines() if str(folder) in line}
    assert len(told) == 1, err
    return told.pop()


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv(backend.VARIABLE, "")  # what --library sets is taken back
    monkeypatch.delenv(backend.VARIABLE)


# --- the params folder


def _index(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / "params" / params.INDEX
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


def _record(number: int, **values: Any) -> Change:
    return lambda folder: _index(folder, lambda told: told["records"][0]["records"][number].update(values))


def _text(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "params" / name).write_text(text)

    return change


def _gone(name: str) -> Change:
    return lambda folder: (folder / "params" / name).unlink()


def _truncate(folder: Path) -> None:
    shard = folder / "params" / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-2])


def _another(config: Config | None, scheme: str, named: str) -> Change:
    def change(folder: Path) -> None:
        weights = open_model("tiny").weights if config is None else synthetic(config, 0)
        shutil.rmtree(folder / "params")
        (folder / "params").mkdir()
        params.write(folder / "params", arrays(weights, scheme), params.chat_config(weights, named), "memory")

    return change


def _chat(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "params" / params.CHAT
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_gone("params_shard_0.bin"), "the folder lacks a shard"),
        (_truncate, "is truncated"),
        (
            _record(4, shape=[63]),
            "param_4 is float16 (63,), but the library takes float16 (128,) for rwkv.blocks.0.ln1.weight",
        ),
        (_record(3, dtype="float32"), "param_3 is float32 (128,), but the library takes float16"),
        (_record(3, dtype="float17"), "not an index of arrays"),
        (_record(3, name="param_999"), "no record param_3"),
        (_record(3, format="f32-to-bf16"), "is stored as f32-to-bf16; raw is expected"),
        # Groups of 16 where the scheme has 32: twice the scales.
        (_record(1, shape=[256, 8]), "param_1 is float16 (256, 8), but the library takes float16 (256, 4)"),
        (_another(Config(2, 64, 256, 300), SCHEME, SCHEME), "but the library takes"),
        (_another(None, "q0f16", "q0f16"), "is of q0f16, but"),
        (_another(None, "q4f16_0", SCHEME), "but the library takes"),
        (_gone(params.INDEX), "No such file"),
        (_gone(params.CHAT), "No such file"),
        (_text(params.INDEX, "{"), "is not JSON"),
        (_text(params.INDEX, "[]"), "not an index of arrays"),
        (_text(params.INDEX, '{"records": []}'), "no record param_0"),
        (_text(params.CHAT, "{"), "is not JSON"),
        (_text(params.CHAT, "[1]"), "has no local_id"),
        (_chat(local_id="tiny-q8f16_1"), "is of q8f16_1, but"),
        (_chat(model_category="llama"), "of category llama, not rwkv"),
    ],
)
def test_a_params_folder(
    change: Change, said: str, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compiled, tmp_path / "out")
    change(tmp_path / "out")
    assert said in refused(tmp_path / "out", capsys)


def test_the_folder_is_gone(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(compiled, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "params")
    assert "No such file" in refused(tmp_path / "out", capsys)


# --- the library


def _head(at: int, data: bytes) -> Change:
    def change(library: Path) -> None:
        whole = bytearray(library.read_bytes())
        whole[at : at + len(data)] = data
        library.write_bytes(whole)

    return change


def _bytes(data: bytes) -> Change:
    def change(library: Path) -> None:
        library.write_bytes(data)

    return change


def _without_tvm(library: Path) -> None:
    library.write_bytes(library.read_bytes().replace(native._PRESENT, b"another_ab_"))


def _of_2023(library: Path) -> None:
    library.write_bytes(library.read_bytes().replace(native._PRESENT, b"another_ab_") + native._PAST[0])


def _cut_off(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:4096])


_LIBRARIES: list[tuple[Change, str]] = [
    (_bytes(b"not a library"), "is no library of any system"),
    (_bytes(b""), "is empty"),
    (_bytes(b"\x7fELF\x02\x01"), "is truncated"),
    (_head(18, struct.pack("<H", 183)), "is for aarch64; this machine is x86_64"),
    (_head(18, struct.pack("<H", 40)), "is for arm;"),
    (_head(5, b"\x02"), "for a big-endian CPU"),
    (_head(16, struct.pack("<H", 1)), "an object that is not linked yet"),
    (_head(0, b"\xcf\xfa\xed\xfe"), "is for macOS or iOS"),
    (_head(0, b"MZ"), "is for Windows"),
    (_without_tvm, "not one that TVM made"),
    (_of_2023, "for a TVM before its present interface"),
    (_cut_off, "is truncated: 4096 bytes of"),
]


@pytest.mark.parametrize(("change", "said"), _LIBRARIES)
def test_a_library(
    change: Change, said: str, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compiled, tmp_path / "out")
    library = tmp_path / "out" / "rwkv4-llvm.so"
    change(library)
    assert said in refused(tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("opencl", "its kernels are for opencl, which it does not run here"),
        ("metal", "no library of TVM is there"),
        ("webgpu", "no library of TVM is there"),
    ],
)
@pytest.mark.usefixtures("_environment")
def test_another_target(target: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compile_to(tmp_path / "out", "--target", target, "--quant", SCHEME)
    assert said in refused(tmp_path / "out", capsys)


def test_which_library(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Objects named as the library, none, and two."""
    compile_to(tmp_path / "out", "--target", "metal", "--quant", SCHEME)
    assert "a packed .tar of objects" in refused(tmp_path / "out" / "rwkv4-metal.tar", capsys)
    shutil.copytree(compiled, tmp_path / "two")
    shutil.copyfile(tmp_path / "two" / "rwkv4-llvm.so", tmp_path / "two" / "other.so")
    assert "holds 2 libraries; name one of them" in refused(tmp_path / "two", capsys)
    (tmp_path / "empty").mkdir()
    assert "no library of TVM is there" in refused(tmp_path / "empty", capsys)


def test_a_group_that_does_not_divide() -> None:
    """A width of 48 is a whole group and a half one: the codec's rule, and the folder says so."""
    weights = synthetic(Config(1, 48, 96, 10), 0)
    shapes = {item.key: array.shape for item, array in arrays(weights, "q4f16_1")}
    assert shapes["blocks.0.att.key.q_scale"] == (48, 2)
    assert shapes["blocks.0.att.key.q_weight"] == (48, 8)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        native.check(tmp_path / "gone.so")
    (tmp_path / "ours.so").write_bytes(np.zeros(3, np.uint8).tobytes())
    with pytest.raises(CheckpointError, match="no library of any system"):
        native.check(tmp_path / "ours.so")
