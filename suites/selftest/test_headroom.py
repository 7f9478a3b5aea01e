"""Headroom: what it predicts to overflow does, in emulation and in torch; its set is the smallest; long texts."""

from __future__ import annotations

import argparse
import csv
import io
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import command_headroom
from harness.headroom import Headroom, document, find
from harness.localize.magnitudes import CHUNK, measure
from harness.localize.whatif import FORMATS, Outcome, emulate, mixed
from harness.models import gate_tokens, open_model
from harness.status import FAILED, PASSED
from reference.checkpoint import save_checkpoint
from reference.config import Config
from reference.errors import InputError, TokenError
from reference.forward import forward
from reference.numerics import Arithmetic
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights
from suites.nan.planted import IN_BLOCK, SUMS, plant, scaled
from suites.selftest.conftest import Done

CONFIG = Config(n_layer=4, n_embd=64, n_ffn=256, n_vocab=256)
WEIGHTS = synthetic(CONFIG, 5)
TOKENS = [int(i) for i in np.random.default_rng(1).integers(0, CONFIG.n_vocab, 48)]
FP16 = Arithmetic("fp16", "fp32", "fp16", "fp32")


def text(n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(n).integers(0, CONFIG.n_vocab, n)]


def test_the_largest_values_are_those_of_a_traced_run() -> None:
    """Chunked or not, with the place where they are; gates and what ReLU drops left out."""
    tokens = text(CHUNK + 40)
    seen: dict[str, np.ndarray] = {}
    forward(WEIGHTS, tokens, tap=seen.__setitem__, all_logits=True)
    peaks = measure(WEIGHTS, tokens)
    assert list(peaks) == list(seen)
    for point, x in seen.items():
        size = np.maximum(x, 0) if point.endswith("ffn.k") else np.abs(x)
        peak = peaks[point]
        assert peak.value >= size.max() * (1 - 1e-4)  # on the way there may be larger ones
        if point.endswith((".wkv", ".rwkv", ".out", ".residual", ".v", ".k", ".k2", "logits")):
            assert peak.value == pytest.approx(size.max(), rel=1e-4)
            assert size[peak.token, peak.channel] == pytest.approx(size.max(), rel=1e-4)


def test_sums_are_larger_than_results() -> None:
    """Of WKV: remembered for ever, values of one sign add up."""
    planted, point = plant(WEIGHTS, TOKENS, SUMS, 2)
    peak = measure(planted, TOKENS, inner=True)[point]
    assert peak.value < 65504 < peak.inner
    assert measure(planted, TOKENS)[point].inner == 0


def test_sums_of_a_product_that_cancel_overflow_on_the_way() -> None:
    """Of 64 products, the first half large and the second their opposite: the result is small, half way it is not."""
    name = "blocks.1.ffn.receptance.weight"
    half = np.full((CONFIG.n_embd, CONFIG.n_embd // 2), 2.0**15, np.float32)
    weight = np.concatenate([half, -half], axis=1)
    mixed_alike = {f"blocks.1.ffn.time_mix_{x}": Tensor.of(np.ones(CONFIG.n_embd, np.float32)) for x in "kr"}
    alike = {"blocks.1.ln2.weight": np.zeros(CONFIG.n_embd, np.float32)}
    alike["blocks.1.ln2.bias"] = np.ones(CONFIG.n_embd, np.float32)
    tensors = {**WEIGHTS.tensors, name: Tensor.of(weight), **mixed_alike, **{n: Tensor.of(a) for n, a in alike.items()}}
    planted = replace(WEIGHTS, tensors=tensors)
    peak = measure(planted, TOKENS, inner=True)["blocks.1.ffn.r"]
    assert peak.value < 65504 < 2.0**20 == peak.inner
    found = find(planted, TOKENS, "fp16", sums=True)
    assert [peak.point for peak in found.overflowing] == ["blocks.1.ffn.r"]


def test_what_only_the_emulation_shows_is_told_and_fails() -> None:
    """Sums in another order may get larger than those that were measured."""
    found = replace(find(WEIGHTS, TOKENS, "fp16"), plain=Outcome("blocks.2.ffn.v", 3, float("nan")))
    assert not found.overflowing
    assert found.overflows
    assert found.near is not None
    assert found.near.point == "blocks.2.ffn.v"
    assert document(found)["overflows"] is True
    assert "first: blocks.2.ffn.v overflows" in command_headroom.rendered(
        found, {"model": "", "scheme": ""}, "table", False
    )


@pytest.mark.parametrize("name", [name for name in IN_BLOCK if name != SUMS])
def test_what_is_predicted_to_overflow_does_in_torch(name: str) -> None:
    """The first operation beyond the limit is the first that is not finite; what is not beyond it stays finite."""
    torch_eager = pytest.importorskip("backends.torch_eager")
    pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[torch]'")
    planted, point = plant(WEIGHTS, TOKENS, name, 2)
    found = find(planted, TOKENS, "fp16")
    bad: list[str] = []
    session = torch_eager.load(planted, "fp16", "cpu", 1)
    session.trace(TOKENS, None, lambda n, x: bad.append(n) if not np.isfinite(x).all() else None)
    assert found.overflowing[0].point == bad[0] == point
    assert found.plain is not None
    assert found.plain.point == point


def test_the_set_is_the_smallest() -> None:
    """With it all is finite; without any one of its members nothing is."""
    planted, _ = plant(WEIGHTS, TOKENS, "att.out", 1)
    found = find(planted, TOKENS, "fp16")
    keep = found.kept.keep
    assert len(keep) > 2
    assert found.kept.confirmed
    for left_out in keep:
        others = [point for point in keep if point != left_out]
        assert not emulate(planted, TOKENS, mixed(FP16, others)).finite, left_out


def test_rescaling_leaves_less_to_do() -> None:
    """A stream just beyond fp16's limit in the last of four layers: with a halving before them nothing is left."""
    largest = measure(WEIGHTS, TOKENS)["blocks.3.ffn.residual"].value
    names = ["blocks.0.ln0.weight", "blocks.0.ln0.bias"]
    names += [f"blocks.{i}.{m}.weight" for i in range(4) for m in ("att.output", "ffn.value")]
    grown = scaled(WEIGHTS, dict.fromkeys(names, 66000 / largest))
    found = find(grown, TOKENS, "fp16", rescale_every=2)
    assert "blocks.3.ffn.residual" in found.kept.keep
    assert all(point.startswith(("blocks.2.", "blocks.3.")) for point in found.kept.keep)
    assert found.rescaled.keep == ()
    assert found.rescaled.confirmed


def test_near_comes_before_beyond() -> None:
    """A value of 40,000 overflows nothing yet and is named."""
    value = measure(WEIGHTS, TOKENS)["blocks.1.att.v"].value
    factor = 40000 / value
    near = scaled(WEIGHTS, {"blocks.1.att.value.weight": factor, "blocks.1.att.output.weight": 1 / factor})
    found = find(near, TOKENS, "fp16")
    assert not found.overflowing
    assert found.near is not None
    assert found.near.point == "blocks.1.att.v"
    assert found.headroom(found.near) == pytest.approx(65504 / 40000, rel=0.01)


def test_formats_differ() -> None:
    planted, point = plant(WEIGHTS, TOKENS, "ffn.k2", 1)
    assert not find(planted, TOKENS, format="bf16").overflowing
    eight = find(planted, TOKENS, format="fp8")
    assert point in eight.kept.keep
    assert eight.plain is None  # fp8 is not emulated here, and says so
    assert not eight.kept.confirmed


def test_memory_does_not_grow_with_the_text() -> None:
    def peak(n: int) -> int:
        tracemalloc.start()
        try:
            measure(WEIGHTS, text(n))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    measure(WEIGHTS, text(8))
    assert peak(8 * CHUNK) < 1.2 * peak(2 * CHUNK)


def test_bad_input_is_refused() -> None:
    with pytest.raises(TokenError, match="at least one"):
        find(WEIGHTS, [])
    bad = Weights(CONFIG, WEIGHTS.tensors, "model.pth", non_finite=("blocks.1.att.key.weight",))
    with pytest.raises(InputError, match=r"model\.pth: blocks\.1\.att\.key\.weight holds NaN"):
        find(bad, TOKENS)


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command_headroom.options(parser)
    return parser.parse_args([*words, "--threads", "1"])


def told(kind: str, *words: str) -> tuple[str, int]:
    return command_headroom.run(asked(*words), lambda text: None, kind)


def test_the_table_fits_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "planted.safetensors"
    model = open_model("tiny")
    planted, point = plant(model.weights, gate_tokens(model, 32), "ffn.v", 4)
    save_checkpoint(planted, str(path), "safetensors", "fp32")
    table, code = told("table", "--model", str(path), "--tokens", "32")
    assert code == FAILED
    assert f"first: {point} overflows" in table
    assert "ffn.v in layer 4" in table
    assert max(map(len, table.splitlines()[1:])) <= 80
    assert len(told("table", "--tokens", "8", "--layers")[0].splitlines()) > 9 * 20


def test_every_format_has_every_operation() -> None:
    document, code = told("json", "--tokens", "8")
    assert code == PASSED
    found: dict[str, Any] = json.loads(document)
    assert found["schema"] == 1
    assert len(found["operations"]) == 2 + 9 * 20 + 2
    assert {"point", "layer", "value", "headroom", "rescaled_headroom"} <= set(found["operations"][0])
    assert len(list(csv.DictReader(io.StringIO(told("csv", "--tokens", "8")[0])))) == 184
    assert len(told("jsonl", "--tokens", "8")[0].splitlines()) == 184
    assert told("md", "--tokens", "8")[0].count("\n| --- |") == 1


def test_a_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a, b" * 10, encoding="utf-8")
    assert json.loads(told("json", "--text", str(path))[0])["tokens"] == 40
    path.write_text("")
    with pytest.raises(InputError, match="empty"):
        told("json", "--text", str(path))
    with pytest.raises(InputError, match="No such file"):
        told("json", "--text", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--float", "fp61"), "did you mean 'fp16'"),
        (("--rescale-every", "0"), "at least 1"),
        (("--tokens", "0"), "at least 1"),
        (("--quant", "fp61"), "no scheme"),
        (("--quant", "int4"), "int4 is a class of schemes; give one of .*q4f16_1.*Q4_0"),
        (("--seed", "-1"), "0 or more"),
    ],
)
def test_bad_options(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        told("table", *words)


def test_a_class_of_one_scheme_means_that_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference.schemes.scheme_names", lambda scheme_class: ["fp16"])
    assert json.loads(told("json", "--tokens", "8", "--quant", "int4")[0])["scheme"] == "fp16"


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    bench: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_headroom, "run", lambda *_: pytest.fail("it ran"))
    done = bench("headroom", "--output", str(tmp_path / "none" / "x.txt"))
    assert (done.code, done.out) == (2, "")
    assert "does not exist" in done.err


def test_zeros_have_all_the_room_there_is() -> None:
    silent = WEIGHTS.map(lambda n, t: Tensor.of(t.array() * 0) if n == "blocks.1.ffn.value.weight" else t)
    found: Headroom = find(silent, TOKENS)
    peak = next(peak for peak in found.peaks if peak.point == "blocks.1.ffn.v")
    assert found.headroom(peak) == float("inf")


#: Exponent and mantissa bits, bias, and codes that are no finite number at the top: all of the last exponent, or one.
BITS = {"fp16": (5, 10, 15, True), "fp8_e5m2": (5, 2, 15, True), "fp8": (4, 3, 7, False), "bf16": (8, 7, 127, True)}


@pytest.mark.parametrize("name", BITS)
def test_limits_are_those_of_the_format_s_bits(name: str) -> None:
    """Counted from the bits: the last finite code, and halfway to the next one, where the even of both is taken."""
    exponent_bits, mantissa_bits, bias, ieee = BITS[name]
    last = (((1 << exponent_bits) - 1) << mantissa_bits) - 1  # before the codes of Inf and NaN
    if not ieee:
        last = (1 << (exponent_bits + mantissa_bits)) - 2  # before the one code of NaN

    def value(code: int) -> float:
        exponent, mantissa = divmod(code, 1 << mantissa_bits)
        return float((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))

    largest, edge = FORMATS[name]
    halfway = (value(last) + value(last + 1)) / 2
    assert largest == value(last)
    assert edge == (np.nextafter(halfway, np.inf) if last % 2 == 0 else halfway)
