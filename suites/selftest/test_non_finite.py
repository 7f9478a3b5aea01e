"""A checkpoint that holds NaN or Inf: every command that fails on it blames the file, not the arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness.models import EMBEDDED
from harness.non_finite import checkpoint_holds
from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.config import Config
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights
from suites.selftest.conftest import Done

Bench = Callable[..., Done]

NAME = "blocks.1.att.value.weight"
HOLDS = f"the checkpoint holds NaN or Inf in {NAME}"


def spoil(weights: Weights, value: float, *names: str) -> Weights:
    """The same weights with one element of each of ``names`` replaced."""

    def change(name: str, tensor: Tensor) -> Tensor:
        array = np.array(tensor.array())
        if name in names:
            array.flat[-1] = value
        return Tensor.of(array)

    return weights.map(change)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model with one NaN, as a file."""
    path = tmp_path_factory.mktemp("spoiled") / "nan.safetensors"
    weights = load_checkpoint(str(EMBEDDED / "tiny.safetensors"))
    save_checkpoint(spoil(weights, np.nan, NAME), path, "safetensors")
    return str(path)


def test_what_is_said_names_the_first_few() -> None:
    weights = synthetic(Config(2, 64, 128, 50))
    assert checkpoint_holds(weights) == ""
    assert checkpoint_holds(spoil(weights, np.inf, NAME)) == HOLDS
    many = checkpoint_holds(spoil(weights, np.nan, *list(weights)[:7]))
    assert many.endswith(" and 3 more")


@pytest.mark.parametrize("command", ["parity", "quality"])
def test_a_row_blames_the_checkpoint(command: str, spoiled: str, bench: Bench, tmp_path: Path) -> None:
    few = ("--tokens", "128", "--context", "32") if command == "quality" else ()
    argv = ("--model", spoiled, "--backend", "numpy", "--quant", "fp32", "--threads", "1", *few, "--format", "json")
    done = bench(command, *argv)
    assert done.code == 1
    rows = [row for row in json.loads(done.out)["rows"] if row["metric"] in ("parity", "state_parity")]
    assert rows
    for row in rows:
        assert HOLDS in row["reason"]
        assert "arithmetic itself overflows" not in row["reason"]


def test_drift_blames_the_checkpoint(spoiled: str, bench: Bench) -> None:
    argv = ("localize", "--model", spoiled, "--backend", "numpy", "--quant", "fp32", "--in-process", "--drift", "64")
    done = bench(*argv)
    assert (done.code, HOLDS in done.out) == (1, True)
    found = json.loads(bench(*argv, "--format", "json").out)
    assert (found["verdict"], found["drift"]["curves"]) == ("bad-weights", [])
