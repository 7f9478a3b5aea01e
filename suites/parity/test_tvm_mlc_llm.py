"""Libraries with the ABI of MLC-LLM's RWKV-4, which say nothing of ours: a stand-in built with TVM of today."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import tvm_mlc as backend
from backends.api import Scoring, Unavailable, Unsupported
from backends.tvm_mlc import params
from backends.tvm_mlc.instrument import words
from backends.tvm_mlc.mlc_library import stored_2023, taken_from
from backends.tvm_mlc.points import trace_points
from backends.tvm_mlc.storage import Parameter, arrays, parameters
from harness import open_session
from harness.cell_rows import arithmetic_text
from harness.isolation import start
from harness.isolation.answers import check_answer
from harness.isolation.frames import FrameError
from harness.parity import gate
from harness.tolerance import derive
from harness.trace_point import first_bad_point
from reference.config import Config
from reference.errors import CheckpointError
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Weights
from suites.parity.tvm_traces import shown_as_the_reference

ROOT = Path(__file__).parents[2]
MODEL = Config(n_layer=3, n_embd=64, n_ffn=256, n_vocab=299)
WEIGHTS = synthetic(MODEL, 4)

#: As wide as RWKV-4 169m, where sums in float16 are off by more than float16 values with sums in float32 are.
WIDE = synthetic(Config(n_layer=2, n_embd=768, n_ffn=3072, n_vocab=299), 4)

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def _python() -> str:
    try:
        found = start.environment("tvm", backend)
    except Unavailable as missing:
        pytest.skip(str(missing))
    assert found is not None
    return str(found.python)


@pytest.fixture(scope="module")
def library(_python: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Build a stand-in of a scheme and options, once; its folder."""
    made: dict[str, Path] = {}

    def make(scheme: str, weights: Weights = WEIGHTS, **options: Any) -> Path:
        config = weights.config
        sizes = [config.n_layer, config.n_embd, config.n_ffn, config.n_vocab]
        key = json.dumps([scheme, sizes, options], sort_keys=True)
        if key not in made:
            made[key] = folder = tmp_path_factory.mktemp("mlc")
            asked = json.dumps({"sizes": sizes, "scheme": scheme, "folder": str(folder), **options})
            script = str(ROOT / "suites" / "parity" / "mlc_stand_in.py")
            done = subprocess.run(
                [_python, script, asked], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False
            )
            assert done.returncode == 0, done.stderr.decode()[-2000:]
            _write(folder, weights, scheme, options)
        return made[key]

    return make


def _write(folder: Path, weights: Weights, scheme: str, options: dict[str, Any]) -> None:
    """The params folder as MLC-LLM wrote it: no names, chat configuration of its keys."""
    (folder / "params").mkdir()
    items = list(arrays(weights, scheme, options.get("rescale_every", 0)))
    if options.get("uint16"):
        forms = stored_2023([item for item, _ in items], scheme)
        items = [(form, _five_codes(item, form, array)) for form, (item, array) in zip(forms, items, strict=True)]
    params.write(folder / "params", iter(items), params.chat_config(weights, scheme), "memory")
    index = folder / "params" / params.INDEX
    told = json.loads(index.read_text())
    del told["metadata"]["names"]
    index.write_text(json.dumps(told))


def _five_codes(item: Parameter, form: Parameter, array: np.ndarray) -> np.ndarray:
    """Codes of 3 bits, ten to a uint32, as five to a uint16."""
    if item.shape == form.shape:
        return array
    axis = next(a for a in (0, 1) if item.shape[a] != form.shape[a])
    halves = np.stack([array & 0x7FFF, array >> np.uint32(15)], axis=axis + 1)
    return np.ascontiguousarray(halves.reshape(form.shape).astype(np.uint16))


def prompt(count: int = 40) -> list[int]:
    return [int(i) for i in np.random.default_rng(1).integers(0, MODEL.n_vocab, count)]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("q0f32", {}),
        ("q0f32", {"fused": False}),
        ("q0f32", {"prefill": False}),
        ("q0f16", {}),
        ("q4f16_1", {}),
    ],
)
def test_gate(scheme: str, options: dict[str, Any], library: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole gate: decode, prefill, chunks, replayed states, handed over states."""
    monkeypatch.setenv(backend.VARIABLE, str(library(scheme, **options)))
    tokens = prompt()
    with open_session("tvm", WEIGHTS, scheme, threads=1) as found:
        assert not isinstance(found.session, Scoring)
        assert arithmetic_text(found) == f"{found.arithmetic} (declared, unverified)"
        checked = gate(found.session, derive(WEIGHTS, scheme, found.arithmetic, tokens))
    assert checked.passed, str(checked.first_bad)
    assert checked.state


def test_gate_at_a_real_width(library: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right kernels of another arithmetic than ours pass by their own, and only by it."""
    monkeypatch.setenv(backend.VARIABLE, str(library("q0f16", WIDE)))
    tokens = prompt(12)
    with open_session("tvm", WIDE, "q0f16", threads=1) as found:
        assert found.arithmetic == Arithmetic("fp16", "fp16", "fp16", chain=3072)
        checked = gate(found.session, derive(WIDE, "q0f16", found.arithmetic, tokens))
        ours = gate(found.session, derive(WIDE, "q0f16", backend.INFO.arithmetic("q0f16", "cpu"), tokens))
    assert checked.passed, str(checked.first_bad)
    assert not ours.passed


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("q0f32", {}),
        ("q0f16", {}),
        ("q4f16_0", {}),
        ("q4f16_1", {"fused": False}),
        ("q4f16_1", {"rescale_every": 2}),
        ("q0f16", {"rescale_every": 1, "fused": False}),
        ("q3f16_0", {"uint16": True}),
        ("q3f16_1", {"uint16": True}),
    ],
)
def test_trace(scheme: str, options: dict[str, Any], library: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point that is shown is the reference's, for a token and for many, from the start and from a state."""
    monkeypatch.setenv(backend.VARIABLE, str(library(scheme, **options)))
    with open_session("tvm", WEIGHTS, scheme, threads=1) as found:
        names = set(shown_as_the_reference(found.session, apply(WEIGHTS, scheme), found.arithmetic, prompt(9)))
    usual = (
        "ln1",
        "att.xk",
        "att.k",
        "att.v",
        "att.wkv",
        "att.rwkv",
        "att.residual",
        "ffn.xr",
        "ffn.k2",
        "ffn.residual",
    )
    assert names >= {f"blocks.{i}.{name}" for i in range(MODEL.n_layer) for name in usual}
    # One token's kernels show the whole layer only where nothing is fused.
    assert (names >= set(trace_points(MODEL.n_layer)[:-2])) == (not options.get("fused", True))


def test_first_bad_point_of_a_fault(library: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Localizing works over an instrument: the fault is seen where it is, and nowhere without one."""
    monkeypatch.setenv(backend.VARIABLE, str(library("q0f32")))
    name = "blocks.1.att.value.weight"
    wrong = np.array(WEIGHTS[name].array())
    wrong[3] *= 1.01
    with open_session("tvm", WEIGHTS, "q0f32", threads=1) as found:
        arithmetic, tokens = found.arithmetic, prompt(12)
        assert first_bad_point(found.session, WEIGHTS, arithmetic, tokens) is None
        other = WEIGHTS.map(lambda n, tensor: type(tensor).of(wrong) if n == name else tensor)
        bad = first_bad_point(found.session, other, arithmetic, tokens)
    assert bad is not None
    assert bad.name == "blocks.1.att.v"


DECLARING = """
from backends.numpy_reference import INFO, load as numpy_load
from reference.numerics import Arithmetic

def load(checkpoint, scheme, device, threads):
    session = numpy_load(checkpoint, scheme, device, threads)
    session.declared_arithmetic = lambda: Arithmetic("fp16", "fp16", "fp16", chain=64)
    return session
"""


@pytest.mark.parametrize("isolate", [False, True])
def test_a_session_that_knows_better(isolate: bool, tmp_path: Path) -> None:
    """What it declares of itself takes the place of INFO's, here and in a process of its own, and is not verified."""
    path = tmp_path / "declaring.py"
    path.write_text(DECLARING)
    with open_session(str(path), WEIGHTS, "fp32", isolate=isolate) as found:
        assert found.arithmetic == Arithmetic("fp16", "fp16", "fp16", chain=64)
        assert arithmetic_text(found) == "fp16/acc fp16/res fp16/wkv fp32/chain 64 (declared, unverified)"
    with open_session("numpy", WEIGHTS, "fp32", isolate=isolate) as found:
        assert (found.arithmetic, found.info.arithmetic_documented) == (Arithmetic(), True)


@pytest.mark.parametrize("forged", ["fp16", ["fp16"], {"activations": "fp8"}, {"accuracy": "fp32"}, {"chain": "1"}])
def test_an_arithmetic_that_is_none(forged: Any) -> None:
    """The code of a backend can write an answer itself."""
    opened: dict[str, Any] = {"version": None, "capabilities": [], "load_ns": 1, "cpus": None}
    for told in (None, {"accumulation": "fp16"}):
        check_answer({"id": 1, "ok": {**opened, "arithmetic": told}}, [], "open", 1)
    with pytest.raises(FrameError, match="something missing"):
        check_answer({"id": 1, "ok": {**opened, "arithmetic": forged}}, [], "open", 1)


#: What ``RWKVForCausalLM(RWKVConfig(1, 299, 96, 320))`` takes, name, shape and type of a parameter in the order in
#: which its modules set them up: ``mlc_llm/relax_model/rwkv.py`` of mlc-llm at e4341b30 (2024-03-03), sizes filled in.
HALF_2024 = [
    ("rwkv.embeddings.weight", (299, 96), "float16"),
    ("rwkv.blocks.0.pre_ln.weight", (96,), "float16"),
    ("rwkv.blocks.0.pre_ln.bias", (96,), "float16"),
    ("rwkv.blocks.0.ln1.weight", (96,), "float16"),
    ("rwkv.blocks.0.ln1.bias", (96,), "float16"),
    ("rwkv.blocks.0.ln2.weight", (96,), "float16"),
    ("rwkv.blocks.0.ln2.bias", (96,), "float16"),
    ("rwkv.blocks.0.attention.time_decay", (96,), "float32"),
    ("rwkv.blocks.0.attention.time_first", (96,), "float32"),
    ("rwkv.blocks.0.attention.time_mix_key", (96,), "float16"),
    ("rwkv.blocks.0.attention.time_mix_value", (96,), "float16"),
    ("rwkv.blocks.0.attention.time_mix_receptance", (96,), "float16"),
    ("rwkv.blocks.0.attention.key.weight", (96, 96), "float16"),
    ("rwkv.blocks.0.attention.value.weight", (96, 96), "float16"),
    ("rwkv.blocks.0.attention.receptance.weight", (96, 96), "float16"),
    ("rwkv.blocks.0.attention.output.weight", (96, 96), "float16"),
    ("rwkv.blocks.0.feed_forward.time_mix_key", (96,), "float16"),
    ("rwkv.blocks.0.feed_forward.time_mix_receptance", (96,), "float16"),
    ("rwkv.blocks.0.feed_forward.key.weight", (320, 96), "float16"),
    ("rwkv.blocks.0.feed_forward.receptance.weight", (96, 96), "float16"),
    ("rwkv.blocks.0.feed_forward.value.weight", (96, 320), "float16"),
    ("rwkv.ln_out.weight", (96,), "float16"),
    ("rwkv.ln_out.bias", (96,), "float16"),
    ("head.weight", (299, 96), "float16"),
]

#: Codes and scales that its q4f16_1 has for a matrix: ``GroupQuantizationSpec`` of ``mlc_llm/quantization`` at e4341b30
#: with int4, storage_nbit 32, group_size 32, transpose False, for embedding, linear layers and head.
CODES_2024 = {
    (299, 96): (((299, 12), "uint32"), ((299, 3), "float16")),
    (96, 96): (((96, 12), "uint32"), ((96, 3), "float16")),
    (320, 96): (((320, 12), "uint32"), ((320, 3), "float16")),
    (96, 320): (((96, 40), "uint32"), ((96, 10), "float16")),
}


@pytest.mark.parametrize("scheme", ["q0f16", "q4f16_1"])
def test_parameters_are_those_of_mlc_llm(scheme: str) -> None:
    """Names, order, shapes and types, against what was read in its source, not against what writes the stand-in."""
    wanted = []
    for name, shape, dtype in HALF_2024:
        if scheme == "q0f16" or shape not in CODES_2024:
            wanted.append((name, shape, dtype))
            continue
        stem = name.rpartition(".")[0]
        wanted += [
            (f"{stem}.{part}", *form) for part, form in zip(("q_weight", "q_scale"), CODES_2024[shape], strict=True)
        ]
    found = parameters(Config(n_layer=1, n_embd=96, n_ffn=320, n_vocab=299), scheme)
    assert [(item.name, item.shape, item.dtype) for item in found] == wanted


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("fused_NT_matmul2_add1", {"matmul", "add"}),
        ("fused_fused_decode3_NT_matmul_sigmoid1", {"matmul", "sigmoid"}),
        ("layer_norm", {"layer_norm"}),
        ("fused_decode_take", {"take"}),
        ("fused_relax_matmul_cublas", None),
        ("matmultiply", None),
        ("", None),
    ],
)
def test_words(name: str, operators: set[str] | None) -> None:
    assert words(name) == operators


@pytest.mark.parametrize("said", ["Llama-2-7b-chat-hf", "RWKV5", "gpt_neox"])
def test_another_architecture(said: str, library: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, str(library("q0f32", model_name=said)))
    with pytest.raises(CheckpointError, match=f"is of {said}, not of RWKV-4"), open_session("tvm", WEIGHTS, "q0f32"):
        pytest.fail("it was opened")


def test_what_does_not_fit(library: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another model, another scheme, a folder of another library, q4f32 of 2023: one line each."""
    folder = library("q0f32")
    monkeypatch.setenv(backend.VARIABLE, str(folder))

    def opens(said: str, error: type[Exception] = CheckpointError, scheme: str = "q0f32", model: Any = WEIGHTS) -> None:
        with pytest.raises(error, match=said) as raised, open_session("tvm", model, scheme, threads=1):
            pytest.fail("it was opened")
        assert "\n" not in str(raised.value)

    opens("gives 15 rows of state; a model of 2 layers has 10", model=synthetic(Config(2, 64, 256, 299), 0))
    opens("not that of RWKV-4 with 96 channels", model=synthetic(Config(3, 96, 384, 299), 0))
    opens(
        "param_0 is float32 .299, 64., but the library takes float32 .300, 64.",
        model=synthetic(Config(3, 64, 256, 300), 0),
    )
    opens("is of q0f32, not of q0f16", Unsupported, "q0f16")

    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "rwkv-llvm.so").write_bytes((folder / "rwkv-llvm.so").read_bytes())
    (mixed / "params").mkdir()
    params.write(mixed / "params", arrays(WEIGHTS, "q0f16"), params.chat_config(WEIGHTS, "q0f16"), "memory")
    monkeypatch.setenv(backend.VARIABLE, str(mixed))
    opens("does not take .*params: ", scheme="q0f16")

    index = mixed / "params" / params.INDEX
    for file in (mixed / "params").iterdir():
        file.unlink()
    params.write(mixed / "params", arrays(WEIGHTS, "q4f32_1"), params.chat_config(WEIGHTS, "q4f32_1"), "memory")
    told = json.loads(index.read_text())
    for record in (record for shard in told["records"] for record in shard["records"]):
        i = int(record["name"].split("_")[1])
        if parameters(MODEL, "q4f32_1")[i].part == "q_scale":
            record["dtype"] = "uint32"
    index.write_text(json.dumps(told))
    opens("MLC-LLM's of 2023, a bfloat16 scale and minimum", Unsupported, "q4f32_1")


def test_another_order_of_parameters(library: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that are this model's in an order that is not known: nothing is named, so nothing is traced."""
    folder = library("q4f16_1") / "params"
    kept = (folder / params.INDEX).read_text()
    told = json.loads(kept)
    records = [record for shard in told["records"] for record in shard["records"]]
    records[0]["name"], records[1]["name"] = records[1]["name"], records[0]["name"]
    try:
        (folder / params.INDEX).write_text(json.dumps(told))
        assert all(not item.tensor for item in taken_from(folder, MODEL, "q4f16_1"))
    finally:
        (folder / params.INDEX).write_text(kept)
    assert all(item.tensor for item in taken_from(folder, MODEL, "q4f16_1"))
