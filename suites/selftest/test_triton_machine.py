"""Where Triton cannot run, one line says why and what to do: versions, drivers, devices, memory."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest

from backends import triton_cuda
from backends.api import Unavailable, Unsupported
from backends.shared import torch_devices
from backends.triton_cuda import machine
from harness.budget import device_bytes, device_shortage
from harness.card import Card
from reference.config import preset
from reference.schemes import bytes_read_per_token
from suites.throughput import triton_rwkv

GIB = 1 << 30


def _missing(name: str) -> Any:
    raise OSError(name)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is off, and both packages are there and belong together."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(machine, "installed", {"triton": "3.9.0", "torch": "2.13.0"}.get)
    monkeypatch.setattr(machine, "torch_wants", lambda: "3.9.0")


@pytest.mark.parametrize(
    ("triton", "torch", "wanted", "said"),
    [
        ("3.5.1", "2.13.0", "", "triton 3.5.1 is too old; 3.6 is the oldest that works; pip install"),
        ("3.9.0", "2.7.1", "", "torch 2.7.1 is too old; 2.8 is"),
        ("3.9.0", "2.11.0", "3.6.0", "torch 2.11.0 belongs with triton 3.6.0, not 3.9.0; pip install triton==3.6.0"),
        ("3.6.0", "2.13.0", "3.9.0", "belongs with triton 3.9.0, not 3.6.0"),
    ],
)  # fmt: skip
def test_versions_that_do_not_belong_together(triton: str, torch: str, wanted: str, said: str) -> None:
    with pytest.raises(Unavailable) as caught:
        machine.check_pair(triton, torch, wanted)
    assert said in str(caught.value)


@pytest.mark.parametrize(("triton", "torch"), [("3.6.0", "2.11.0"), ("3.9.0", "2.13.0+cpu"), ("3.9.1", "2.13.0")])
def test_versions_that_do(triton: str, torch: str) -> None:
    machine.check_pair(triton, torch, "" if "+cpu" in torch else triton[:3] + ".0")


@pytest.mark.parametrize("lacking", ["triton", "torch"])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    monkeypatch.setattr(machine, "installed", lambda package: "" if package == lacking else "3.9.0")
    with pytest.raises(Unavailable, match=rf"^{lacking} is not installed; pip install"):
        triton_cuda.check()


@pytest.mark.usefixtures("compiling")
def test_no_driver_is_unavailable_and_names_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", _missing)
    with pytest.raises(Unavailable, match=r"^no CUDA driver here \(libcuda.so.1\); .*TRITON_INTERPRET=1"):
        triton_cuda.check()


@pytest.mark.usefixtures("compiling")
def test_the_interpreter_needs_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ctypes, "CDLL", None)
    triton_cuda.check()


def test_a_gpu_too_old_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"Tesla V100 has compute capability 7.0; the kernels need 8.0"):
        machine.check_capability("Tesla V100", (7, 0))
    machine.check_capability("NVIDIA H200", (9, 0))


def test_memory_that_is_too_small_says_what_would_fit() -> None:
    config, schemes = preset("7b-world"), ("fp16", "fp32", "q4f16_1")
    with pytest.raises(Unavailable) as caught:
        machine.check_memory(config, "fp16", 2048, 10 * GIB, 12 * GIB, schemes)
    said = str(caught.value)
    assert "10.0 of 12.0 are free; q4f16_1 (" in said
    assert said.endswith("GiB) would fit")
    assert "\n" not in said
    with pytest.raises(Unavailable, match="no scheme of this model would fit"):
        machine.check_memory(config, "fp16", 2048, 2 * GIB, 12 * GIB, schemes)
    machine.check_memory(config, "fp16", 2048, 20 * GIB, 24 * GIB, schemes)


def test_the_prediction_counts_weights_once_and_what_a_piece_needs() -> None:
    config = preset("7b-world")
    weights = 2 * 7_515_000_000
    assert weights < machine.needed_bytes(config, "fp16", 1) < 1.1 * weights
    assert (
        machine.needed_bytes(config, "fp16", 4096) - machine.needed_bytes(config, "fp16", 2048)
        > 2048 * 6 * config.n_ffn
    )
    assert machine.needed_bytes(config, "q4f16_1", 1) < 0.4 * weights


@pytest.mark.parametrize("scheme", ["fp16", "q4f16_1"])
def test_the_harness_and_the_backend_predict_one_number(scheme: str) -> None:
    """On a card with a byte less the harness refuses, as the backend would; with the last byte neither does."""
    config = preset("7b-world")
    needed = machine.needed_bytes(config, scheme, machine.PIECE)
    assert device_bytes(config, scheme, triton_cuda, 256) == needed
    for free in (needed - 1, needed):
        card = Card(0, "GPU", "x", free, 80 * GIB, None, None, "570")
        refused = device_shortage(config, scheme, triton_cuda, 256, "cuda", card) is not None
        assert refused is (free < needed)
        with pytest.raises(Unavailable) if refused else nullcontext():
            machine.check_memory(config, scheme, machine.PIECE, free, 80 * GIB, (scheme,))


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("mps", "triton has no device 'mps'; it has cuda and cuda:<index>"),
        ("cuda:x", "triton has no device 'cuda:x'"),
        ("cpu:1", "triton has no device 'cpu:1'"),
        ("cpu", "triton compiles for GPUs only; TRITON_INTERPRET=1 runs"),
    ],
)
def test_devices_that_it_does_not_have(monkeypatch: pytest.MonkeyPatch, device: str, said: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[triton]'")
    from backends.triton_cuda import tiles

    monkeypatch.setattr(tiles, "INTERPRETED", False)
    with pytest.raises(Unsupported) as caught:
        machine.open_device(device)
    assert said in str(caught.value)


@pytest.mark.usefixtures("compiling")
def test_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without CUDA, no device, and an index beyond the last; each on a torch that says so."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[triton]'")
    from backends.triton_cuda import tiles

    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Unavailable, match="is a build without CUDA"):
        machine.open_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch_devices, "driver_version", lambda: 13000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="torch sees no CUDA device"):
        machine.open_device("cuda")
    monkeypatch.setattr(torch_devices, "driver_version", lambda: 12040)
    with pytest.raises(Unavailable, match=r"driver is too old: it has CUDA 12.4, torch was built for 13.0; install"):
        machine.open_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Unavailable, match=r"there is no cuda:2; torch sees 2 CUDA device\(s\)"):
        machine.open_device("cuda:2")


def test_the_interpreter_is_never_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[triton]'")
    from backends.triton_cuda import tiles

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tiles, "INTERPRETED", True)
    with pytest.raises(Unsupported, match="TRITON_INTERPRET is set, so no kernel is compiled for cuda"):
        machine.open_device("cuda")
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    with pytest.raises(Unsupported, match="was changed after this process had defined its kernels"):
        machine.open_device("cpu")


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("script", ["triton_wkv", "triton_rwkv"])
def test_comparisons_without_a_gpu_say_why_and_end_with_3(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", _missing)
    assert import_module(f"suites.throughput.{script}").main([]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("no CUDA driver here")
    assert said.err.count("\n") == 1


def test_the_comparison_with_the_rwkv_package_is_printed_as_ratios_and_fractions() -> None:
    config = preset("7b-world")
    mine, rival = (triton_rwkv.Speeds(n, "fp16", d, {512: p}) for n, d, p in (("triton", 200, 9e3), ("rwkv", 50, 9e3)))
    printed = triton_rwkv.table([mine, rival], rival, config, 4e12, 800e12)
    decode, prefill = (line.split() for line in printed.splitlines()[1:3])
    assert decode[-3:] == ["200.0", f"{200 * bytes_read_per_token(config, 'fp16') / 4e12:.1%}", "4.00"]
    assert prefill[:3] == ["triton", "fp16", "512"]
    assert prefill[-1] == "1.00"
    assert 0.10 < float(prefill[-2].rstrip("%")) / 100 < 0.18  # 14 GFLOP a token
    assert not triton_rwkv._met(mine, rival)
    assert triton_rwkv._met(mine, triton_rwkv.Speeds("rwkv", "fp16", 50, {512: 6e3}))


def test_a_scheme_it_does_not_have() -> None:
    with pytest.raises(Unsupported, match="triton has no scheme 'Q4_0'; it has fp16"):
        triton_cuda.load(None, "Q4_0", "cuda", None)  # type: ignore[arg-type]
