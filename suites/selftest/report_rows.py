"""Rows as the harness writes them, made up by rule: several machines, verdicts, runs, kinds, quality and rooflines."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from harness.rows import Row
from harness.samples import Workload
from harness.stats import derived

CONFIG = {"n_layer": 12, "n_embd": 768, "n_ffn": 3072, "n_vocab": 50277, "rescale_every": 0}
PARAMETERS = 12 * (5 * 768**2 + 2 * 768 * 3072) + 768 * 50277

MACHINES = {"cpu": "AMD EPYC 9654", "a800": "NVIDIA A800-SXM4-80GB", "m2": "Apple M2"}
BANDWIDTH = {"cpu": 38e9, "a800": 1.9e12, "m2": 95e9}
RATE = {"cpu": 4e11, "a800": 2.4e14, "m2": 3.2e12}
SCHEMES = {"fp32": ("f32", 4.0), "fp16": ("f16", 2.0), "Q8_0": ("int8", 1.06), "q4f16_1": ("int4", 0.56)}
BACKENDS = ("torch", "onnx", "rwkv.cpp", "tvm")

#: What a reason may hold: markup of every format that a report is written in.
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)> | `code` </script> "&amp; \u2028 é'


def cell(
    backend: str = "torch",
    scheme: str = "fp16",
    hardware: str = "cpu",
    run: int = 0,
    speed: float = 1.0,
    seed: int = 0,
    samples: int = 12,
    **fields: Any,
) -> list[Row]:
    """Rows of one passing cell: parity, prefill, first token, decode with blocks, and load."""
    noise = random.Random(f"{backend}{scheme}{hardware}{run}{seed}")
    scheme_class, width = SCHEMES.get(scheme, ("int4", 0.6))
    weights = int(PARAMETERS * width)
    base = Row(
        kind="measured",
        run=f"run-{run}",
        time=f"2026-11-{1 + run:02d}T10:00:{seed % 60:02d}+00:00",
        hardware=hardware,
        hardware_detail={"name": MACHINES.get(hardware, hardware)},
        backend=backend,
        backend_version="1.2",
        model="169m",
        model_sha256="ab" * 32,
        synthetic=True,
        config=CONFIG,
        scheme=scheme,
        scheme_class=scheme_class,
        arithmetic="fp16",
        device="cpu" if hardware == "cpu" else "cuda:0",
        threads=2,
        isolated=False,
        workload=Workload(256, 64),
        metric="parity",
        weight_bytes=weights,
        command=f"rwkv-bench run --backend {backend} --quant {scheme}",
        verdict="PASS",
        error=2e-4,
        bound=6e-4,
        statistic="rms",
        reason="scoring (position 44, token 113): rms error 2.00e-04 <= bound 6.00e-04",
    )
    base = replace(base, **fields)
    share = speed * {"torch": 0.2, "onnx": 0.7, "rwkv.cpp": 0.6, "tvm": 0.55}.get(backend, 0.4)
    bandwidth, rate = BANDWIDTH.get(hardware, 5e10), RATE.get(hardware, 1e12)
    step = weights / (bandwidth * share) * 1e9
    prompt = 256 * 2 * PARAMETERS / (rate * share) * 1e9

    def times(ns: float, n: int = samples) -> tuple[float, ...]:
        return tuple(ns * (1 + abs(noise.gauss(0, 0.03))) for _ in range(n))

    plain = replace(base, error=None, bound=None, statistic=None, value=0.0, reason=None, stopped="repeats reached")
    blocks = tuple(
        {"start": i, "count": 1, "disturbed": "others" if i in (3, 7) else None, "left_out": i in (3, 7)}
        for i in range(samples)
    )
    steps = tuple((int(step),) * 64 for _ in range(samples))
    timed = [
        replace(plain, metric="prefill", unit="", samples=times(prompt)),
        replace(plain, metric="time_to_first_token", unit="", samples=times(prompt * 1.02)),
        replace(
            plain, metric="decode", unit="", samples=times(64 * step), steps=steps, driver="loop", blocks=blocks,
            peak_bytes=weights + 40 * 2**20,
        ),
        replace(plain, metric="load", unit="", samples=(2.5e8,), stopped="single call"),
    ]  # fmt: skip
    return [base, *(_with_roofline(derived(row), weights, bandwidth, rate) for row in timed)]


def _with_roofline(row: Row, weights: int, bandwidth: float, rate: float) -> Row:
    if row.value is None or row.metric not in ("prefill", "decode"):
        return row
    decode = row.metric == "decode"
    told = (
        {"of": "read bandwidth", "rate": bandwidth, "unit": "byte/s"}
        if decode
        else {"of": "fp32 matrix rate", "rate": rate, "unit": "FLOP/s"}
    )
    fraction = row.value * weights / bandwidth if decode else row.value * 2 * PARAMETERS / rate
    return replace(row, roofline_fraction=fraction, extra={"roofline": told})


def quality(backend: str, scheme: str, kl: float, hardware: str = "cpu", **fields: Any) -> Row:
    """What ``rwkv-bench quality`` says of a backend and scheme."""
    base = cell(backend, scheme, hardware)[0]
    found = {"text": "heldout.txt", "ids_sha256": "cd" * 32, "positions": 1024, "context": 128}
    row = replace(
        base, run="quality", metric="kl_divergence", unit="", value=kl, interval=(kl * 0.9, kl * 1.1), reason=None,
        error=None, bound=None, statistic=None, workload=Workload(1024, 0), quality=found,
    )  # fmt: skip
    return replace(row, **fields)


def failed(
    backend: str = "torch", scheme: str = "Q8_0", hardware: str = "cpu", reason: str = HOSTILE, run: int = 0
) -> list[Row]:
    """Rows of a cell whose logits are wrong: no row holds a speed."""
    parity = replace(cell(backend, scheme, hardware, run)[0], verdict="FAIL", error=0.5, reason=reason)
    other = replace(parity, metric="decode", unit="", error=None, bound=None, statistic=None)
    return [parity, other, replace(other, metric="prefill", unit="")]


def refused(backend: str, scheme: str = "fp16", hardware: str = "cpu", run: int = 0) -> Row:
    """The row of something that could not be a cell."""
    return Row(
        kind="measured", run=f"run-{run}", time=f"2026-11-{1 + run:02d}T10:00:00+00:00", hardware=hardware,
        backend=backend, model="169m", scheme=scheme, metric="parity", verdict="UNAVAILABLE",
        reason=f"{backend} is not installed; rwkv-bench setup {backend}",
    )  # fmt: skip


def claim(kind: str = "published", hardware: str = "a800", value: float = 72.4) -> Row:
    """A figure that nobody measured here."""
    return Row(
        kind=kind, hardware=hardware, backend="mlc-llm", model="7b-world", scheme="q0f16", scheme_class="f16",
        metric="decode", value=value, reason="prompt length, spread and driver are not stated",
        extra={"source": "https://example.org/readme"},
    )  # fmt: skip


def recorded(hardware: str = "m2") -> Row:
    """What another program printed on a machine elsewhere."""
    return Row(
        kind="recorded", run="import-1", time="2026-10-01T00:00:00+00:00", hardware=hardware, backend="mlc-llm",
        model="3b", scheme="q4f16_1", scheme_class="int4", metric="decode", value=26.3, reason="as it printed it",
    )  # fmt: skip


def realistic() -> list[Row]:
    """Three machines, four backends and schemes, two runs, one failure, one refusal, quality, and other kinds."""
    rows: list[Row] = []
    for i, (hardware, backend, scheme) in enumerate(_combinations()):
        for run in (0, 1):
            rows += cell(backend, scheme, hardware, run, speed=1.0 if run else 1.1, seed=i)
    rows += [*failed("numpy", "Q8_0"), refused("ncnn"), claim(), claim("predicted", "a100", 131.0), recorded()]
    divergence = {"fp32": 1e-12, "fp16": 9e-7, "Q8_0": 4e-5, "q4f16_1": 0.016}
    return rows + [quality(backend, scheme, divergence[scheme]) for backend in BACKENDS for scheme in SCHEMES]


def many(n: int) -> list[Row]:
    """So many rows, five to a cell, every cell another workload or machine."""
    rows: list[Row] = []
    for i in range(n // 5 + 1):
        backend, scheme = BACKENDS[i % 4], tuple(SCHEMES)[i // 4 % 4]
        rows += cell(backend, scheme, ("cpu", "a800", "m2")[i // 16 % 3], seed=i, workload=Workload(64 + i // 48, 64))
    return rows[:n]


def _combinations() -> Iterator[tuple[str, str, str]]:
    return ((h, b, s) for h in MACHINES for b in BACKENDS for s in SCHEMES if not (h == "m2" and b == "onnx"))
