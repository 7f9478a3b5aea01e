"""The kernels of the Triton backend compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[triton]'")
pytest.importorskip("triton", reason="triton is not installed: pip install 'rwkv-bench[triton]'")


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """Rows of the command that compiles ahead of time; it must not run in the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "suites.throughput.triton_aot", "--format", "json", *arguments]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


ALL_KERNELS = {
    "add_gated", "choose", "dequantize", "embed_norm", "fit", "gemm_packed", "gemv", "gemv_channel_mix",
    "gemv_time_mix", "norm", "norm_mix", "square", "top_of_block", "wkv_output", "wkv_totals",
}  # fmt: skip


def test_every_kernel_compiles_for_a_gpu_and_spills_nothing() -> None:
    rows = compiled("--model", "7b-world", "--quant", "q4f16_1", "--arch", "90")
    assert {row["kernel"] for row in rows} == ALL_KERNELS
    places = {row["what"] for row in rows}
    assert places == {"decode", "batch of 4", "prompt of 16", "prompt of 512", "traced 1", "traced 16"}
    assert all(row["spills"] == 0 and 0 < row["registers"] <= 255 and row["cubin"] > 0 for row in rows)


def test_nothing_is_compiled_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "suites.throughput.triton_aot"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "TRITON_INTERPRET is set, so nothing is compiled: unset it\n"
