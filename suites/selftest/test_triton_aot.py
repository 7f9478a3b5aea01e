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

from backends.triton_cuda.matrix import FUSED_ROWS
from backends.triton_cuda.tiles import gemm_tile
from suites.throughput.triton_aot import PROMPTS


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
    prompts = {"prompt of 16", "prompt of 32", "prompt of 64", "prompt of 512"}
    assert places == {"decode", "batch of 4", "traced 1", "traced 16"} | prompts
    fused = {row["what"] for row in rows if row["kernel"] == "gemm_packed"}
    assert fused >= {"prompt of 32", "prompt of 64"}, "longer prompts have larger tiles"
    assert all(row["spills"] == 0 and 0 < row["registers"] <= 255 and row["cubin"] > 0 for row in rows)


def test_every_tile_of_a_fused_product_is_compiled() -> None:
    """Of prompts and batches up to the length from which packed weights are dequantized first."""
    for kn in (False, True):
        tiles = {gemm_tile(rows, 512, kn) for rows in range(2, FUSED_ROWS + 1)}
        assert {gemm_tile(length, 512, kn) for length in PROMPTS if length <= FUSED_ROWS} == tiles


def test_nothing_is_compiled_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "suites.throughput.triton_aot"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "TRITON_INTERPRET is set, so nothing is compiled: unset it\n"
