"""What an exception of a cell makes of its row: device memory that ran out is no crash."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import failures
from harness.cell_rows import Job
from harness.cli import main
from harness.failures import verdict_of
from harness.gpu_check import ablate
from harness.hardware import Hardware
from harness.isolation.remote import RemoteError
from harness.measure import Workload
from harness.plan import Cell, Request

CELL = Cell("tiny", "rwkv", "fp16", Hardware("h200", "cuda:0", "NVIDIA H200"), 1, Workload(40, 8))
JOB = Job(Request(), None, "r")

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.2 GiB is"
TORCHSCRIPT = (
    f"The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript\nRuntimeError: {SAID}"
)


class OutOfMemoryError(RuntimeError):
    """torch's, by its name."""


@pytest.fixture(autouse=True)
def _bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "save_bundle", lambda *told: tmp_path)


METAL = "Attempting to allocate 48736917632 bytes"
FULL = "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfMemoryError(SAID), "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (OutOfMemoryError("no room"), "no room"),
        (RuntimeError(TORCHSCRIPT), "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "CUDA error: out of memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GiB)"), "MPS backend out of memory"),
        (RuntimeError(f"[metal::malloc] {METAL} which is greater than the maximum"), f"[metal::malloc] {METAL}"),
        (RuntimeError("[malloc_or_wait] Unable to allocate 8 bytes."), "[malloc_or_wait] Unable to allocate 8 bytes"),
        (RemoteError(f"RuntimeError: [METAL] Command buffer execution failed: {FULL}", "Traceback"), FULL),
        (RemoteError(f"OutOfMemoryError: {SAID}", "Traceback"), "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RemoteError("OutOfMemoryError: no room", "Traceback"), "OutOfMemoryError: no room"),
    ],
)
def test_device_memory_that_ran_out_is_unavailable(error: Exception, said: str) -> None:
    why = f"rwkv ran out of memory of cuda:0: {said}; try a smaller scheme, model or prompt"
    assert verdict_of(error, CELL, JOB) == ("UNAVAILABLE", why)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("CUDA out of memory is not what this is"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of memory"),
        RemoteError("RuntimeError: CUDA error: device-side assert triggered", "Traceback"),
        ValueError("OutOfMemoryError"),
    ],
)
def test_anything_else_is_a_crash(error: Exception) -> None:
    assert verdict_of(error, CELL, JOB)[0] == "CRASHED"


def test_what_the_traceback_holds_is_given_back_before_the_device_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[str] = []

    class Tensor:
        """Stands for gigabytes."""

    def forward() -> None:
        tensor = Tensor()
        weakref.finalize(tensor, freed.append, "tensor")
        raise OutOfMemoryError(SAID)

    torch = SimpleNamespace(
        cuda=SimpleNamespace(empty_cache=lambda: freed.append("cache")),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    gc.collect()
    try:
        forward()
    except OutOfMemoryError as error:
        assert not freed
        verdict_of(error, CELL, JOB)
        assert freed == ["tensor", "cache"]


BACKEND = """
from backends import numpy_reference as usual
from backends.numpy_reference import INFO

class OutOfMemoryError(RuntimeError):
    pass

class Session:
    def __init__(self, session, at):
        self._session, self._at = session, at
    def forward(self, tokens, state):
        if len(tokens) >= self._at:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        return self._session.forward(tokens, state)
    def export_state(self, state):
        return self._session.export_state(state)
    def import_state(self, canonical):
        return self._session.import_state(canonical)

def load(weights, scheme, device, threads):
    return Session(usual.load(weights, scheme, device, threads), 2)
"""


def test_a_cell_that_runs_out_has_a_row_that_says_so_and_status_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "short.py"
    file.write_text(BACKEND)
    about = ["--backend", str(file), "--quant", "fp32", "--model", "tiny"]
    words = [*about, "--prompt-tokens", "48", "--decode-tokens", "2", "--repeats", "3", "--store", str(tmp_path / "s")]
    assert main(["run", *words, "--format", "jsonl"]) == 3
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["verdict"] == "UNAVAILABLE"
    assert "ran out of memory of cpu: CUDA out of memory. Tried to allocate 2.00 GiB; try a smaller" in row["reason"]
    assert ablate.main([*about, "--device", "cpu", "--decode-tokens", "2"]) == 3
    assert "it ran out of device memory: CUDA out of memory" in capsys.readouterr().err


def test_memory_that_runs_out_while_decoding_leaves_parity_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.cell_rows import base_row
    from harness.models import open_model

    base = base_row(CELL, open_model("tiny"), JOB)
    for metric, told in (("decode", "decode"), ("prefill", "prefill"), ("load", "parity"), ("first_call", "parity")):
        row = failures.failure_row(OutOfMemoryError(SAID), base, CELL, JOB, metric)
        assert (row.metric, row.verdict) == (told, "UNAVAILABLE")
