"""The tvm backend in its own environment: gates, shapes, NaN, libraries of the user's, targets and artefacts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import tvm_mlc as backend
from backends.api import StateAccess, Unavailable, Unsupported
from backends.tvm_mlc import params
from backends.tvm_mlc.artefacts import SOURCES, objects
from backends.tvm_mlc.storage import arrays, kept, parameters
from backends.tvm_mlc.targets import TARGETS
from harness import command_compile, open_session
from harness.isolation import start
from harness.models import TINY, gate_tokens, open_model
from harness.options import Parser
from harness.parity import gate
from harness.tolerance import derive
from reference.codecs_mlc import MlcGroups
from reference.config import Config
from reference.errors import CheckpointError, InputError
from reference.schemes import Packed, apply, codec_of
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

SHAPES = {
    "two tokens": Config(n_layer=1, n_embd=32, n_ffn=128, n_vocab=2),
    "odd vocabulary": Config(n_layer=2, n_embd=64, n_ffn=256, n_vocab=299),
    "three blocks": Config(n_layer=3, n_embd=96, n_ffn=384, n_vocab=70),
}
SMALL = SHAPES["odd vocabulary"]


@pytest.fixture(scope="module")
def _environment() -> None:
    try:
        start.environment("tvm", backend)
    except Unavailable as missing:
        pytest.skip(str(missing))


def prompt(config: Config, count: int = 40) -> list[int]:
    return [int(i) for i in np.random.default_rng(1).integers(0, config.n_vocab, count)]


def judged(weights: Weights, scheme: str) -> None:
    """Open and gate; fail with the first bad check."""
    tokens = prompt(weights.config)
    with open_session("tvm", weights, scheme, threads=1) as found:
        checked = gate(found.session, derive(weights, scheme, found.arithmetic, tokens))
    assert checked.passed, str(checked.first_bad)
    assert checked.state


def compile_to(folder: Path, *options: str, model: str = "tiny") -> list[str]:
    """Run the command; the lines it says."""
    parser = Parser(prog="rwkv-bench compile")
    command_compile.options(parser)
    lines: list[str] = []
    assert command_compile.run(parser.parse_args([model, str(folder), *options]), lines.append) == 0
    return lines


# --- the session


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", backend.INFO.schemes)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape: str, scheme: str) -> None:
    judged(synthetic(SHAPES[shape], 4, 2.0 if shape == "odd vocabulary" else 1.0), scheme)


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_gate_of_the_embedded_model(scheme: str) -> None:
    model, tokens = open_model("tiny"), gate_tokens(open_model("tiny"), 48)
    truth = derive(model.weights, scheme, backend.INFO.arithmetic(scheme, "cpu"), tokens, model.sha256)
    with open_session("tvm", model, scheme, threads=1) as found:
        checked = gate(found.session, truth)
        one, _ = found.session.forward(tokens[:7], None)
    assert checked.passed, str(checked.first_bad)
    assert not checked.loose
    with open_session("tvm", model, scheme, threads=2) as found:
        two, _ = found.session.forward(tokens[:7], None)
    np.testing.assert_array_equal(one, two)  # every output is summed by one thread


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("name", [f"blocks.{part}.weight" for part in ("0.att.key", "1.ffn.key", "1.ffn.receptance")])
def test_nan_is_not_lost(name: str) -> None:
    """In keys, before the squared ReLU and in a gate: neither a maximum nor an exponential hides it."""
    weights = synthetic(SMALL, 4)
    with_nan = np.array(weights[name].array())
    with_nan[3, 5] = np.nan
    broken = weights.map(lambda n, tensor: Tensor.of(with_nan) if n == name else tensor)
    for scheme in ("q0f32", "q4f16_0", "q4f16_1"):
        with open_session("tvm", broken, scheme, threads=1) as found:
            for tokens in ([7], [7, 8, 9, 10, 11]):
                logits, state = found.session.forward(tokens, None)
                assert np.isnan(logits).all(), (scheme, tokens)
                session = found.session
                assert isinstance(session, StateAccess)
                if ".key" in name and "att" in name:
                    assert np.isnan(session.export_state(state)[0, 2, 3]), scheme


@pytest.mark.usefixtures("_environment")
def test_scoring_is_forward() -> None:
    weights, tokens = synthetic(SMALL, 4), prompt(SMALL, 9)
    with open_session("tvm", weights, "q4f16_1", threads=1) as found:
        session: Any = found.session
        rows = session.logits(tokens, None)
        for i in range(len(tokens)):
            logits, _ = session.forward(tokens[: i + 1], None)
            assert np.abs(rows[i] - logits).max() <= 0.02 * np.abs(logits).max()
        with pytest.raises(InputError, match="token 299 at position 1"):
            session.forward([1, 299], None)


@pytest.mark.parametrize(
    ("scheme", "device", "threads", "said"),
    [
        ("fp16", "cpu", 1, "no scheme 'fp16' here; it has q0f32"),
        ("q0f32", "cuda", 1, "runs on cpu here, not on 'cuda'"),
        ("q0f32", "cpu", 0, "at least one CPU thread; 0 were"),
    ],
)
def test_what_it_does_not_offer(scheme: str, device: str, threads: int, said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        backend.load(synthetic(SMALL, 0), scheme, device, threads)


# --- the command


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("target", [name for name in TARGETS if name != "vulkan"])
def test_every_target_that_is_generated(target: str, tmp_path: Path) -> None:
    """Objects of the target's kind, and every kernel in a GPU's source; the compilation refuses to lack any."""
    if target == "cuda" and shutil.which("nvcc") is None:
        with pytest.raises(Unsupported, match="nvcc, which is not on the path"):
            compile_to(tmp_path / "out", "--target", target)
        return
    lines = compile_to(tmp_path / "out", "--target", target, "--quant", "q4f16_1")
    wanted = TARGETS[target]
    library = tmp_path / "out" / f"rwkv4-{target}{wanted.suffix}"
    kind = {"webgpu": "WebAssembly", "metal": "Mach-O", "metal_x86_64": "Mach-O", "iphone": "Mach-O"}.get(target)
    if kind is not None or target == "android":
        assert set(objects(library)) == {kind or "ELF"}
    assert "9 entry points" in lines[-1]
    source = [file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix in SOURCES.values()]
    assert len(source) == int(wanted.gpu)
    assert all("wkv_n_kernel" in text and "softmax_kernel" in text for text in source)


@pytest.mark.usefixtures("_environment")
def test_what_is_not_generated_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"vulkan: TVM 0\.27.* generates no code for vulkan"):
        compile_to(tmp_path / "out", "--target", "vulkan")
    with pytest.raises(Unsupported, match="no target 'vulcan'; targets: llvm, cuda"):
        compile_to(tmp_path / "out", "--target", "vulcan")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", ["q0f16", "q4f16_0", "q8f16_1", "q4f32_1"])
def test_a_library_of_the_users_with_rescaling(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving the stream after every second layer changes no result beyond the declared arithmetic."""
    compile_to(tmp_path / "out", "--quant", scheme, "--rescale-every", "2")
    monkeypatch.setenv(backend.VARIABLE, str(tmp_path / "out"))
    model, tokens = open_model("tiny"), gate_tokens(open_model("tiny"), 48)
    truth = derive(model.weights, scheme, backend.INFO.arithmetic(scheme, "cpu"), tokens, model.sha256)
    with open_session("tvm", model, scheme, threads=1) as found:
        checked = gate(found.session, truth)
    assert checked.passed, str(checked.first_bad)


@pytest.mark.usefixtures("_environment")
def test_a_library_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    compile_to(out, "--quant", "q4f16_1")
    monkeypatch.setenv(backend.VARIABLE, str(out))

    def opens(said: str, error: type[Exception] = CheckpointError, scheme: str = "q4f16_1", model: Any = TINY) -> None:
        with pytest.raises(error, match=said) as raised, open_session("tvm", model, scheme, threads=1):
            pytest.fail("it was opened")
        assert "\n" not in str(raised.value)

    opens("is compiled for q4f16_1, not for q0f32", Unsupported, "q0f32")
    opens("compiled for another model than .*: n_layer", model=synthetic(SMALL, 0))
    index = out / "params" / params.INDEX
    whole = json.loads(index.read_text())
    whole["records"][0]["records"][3]["dtype"] = "float32"
    index.write_text(json.dumps(whole))
    opens("param_3 is float32 .*, but the library takes float16")
    index.write_text("{")
    opens("is not JSON")
    shard = out / "params" / "params_shard_0.bin"
    index.unlink()
    opens("holds ndarray-cache.json, its shards")
    whole["records"][0]["records"][3]["dtype"] = "float16"
    index.write_text(json.dumps(whole))
    shard.write_bytes(shard.read_bytes()[:-1])
    opens("is truncated")
    library = next(out.glob("*.so"))
    library.write_bytes(b"not a library")
    opens("is no library of any system")
    library.unlink()
    opens("no library of TVM is there")


@pytest.mark.usefixtures("_environment")
def test_compile_refuses_before_it_works(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(InputError, match="exists already"):
        compile_to(tmp_path / "full")
    with pytest.raises(InputError, match="does not exist"):
        compile_to(tmp_path / "nowhere" / "out")
    with pytest.raises(Unsupported, match=r"no scheme Q4_0; it has q0f32"):
        compile_to(tmp_path / "out", "--quant", "Q4_0")
    with pytest.raises(InputError, match="--rescale-every is -1"):
        compile_to(tmp_path / "out", "--rescale-every", "-1")


# --- its files


@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_parameters_are_the_codec_s(scheme: str, tmp_path: Path) -> None:
    """What is written is read back, and dequantizes to the weights that parity is judged by."""
    weights = synthetic(SHAPES["three blocks"], 3)
    written = list(arrays(weights, scheme))
    params.write(tmp_path, iter(written), params.chat_config(weights, scheme), "memory")
    wanted = parameters(weights.config, scheme)
    assert [item for item, _ in written] == wanted
    stored = {item.key: array for item, array in zip(wanted, params.read(tmp_path, wanted), strict=True)}
    for name, tensor in apply(weights, scheme).items():
        form = codec_of(scheme).format(name)
        expected = -np.exp(tensor.array()) if name.endswith("time_decay") else tensor.array()
        if not kept(name, scheme).bits:
            np.testing.assert_array_equal(np.array(stored[name], np.float32), expected, name)
            continue
        assert isinstance(form, Packed)
        assert isinstance(form.packing, MlcGroups)
        stem = name[: -len("weight")]
        packed = form.packing.from_arrays(stored[stem + "q_weight"], stored[stem + "q_scale"], tensor.shape[1])
        np.testing.assert_array_equal(form.packing.dequantize(packed), expected, name)
