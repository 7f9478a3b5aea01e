"""Checkpoints exchanged with the libraries whose formats they are: torch, safetensors, transformers, rwkv."""

from __future__ import annotations

import collections
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.config import Config
from reference.forward import forward
from reference.hf_folder import blinkdl_name, hf_name
from reference.synthetic import synthetic
from suites.selftest.checkpoint_files import SMALL, arrays, random_bits, random_values, same, torch_dict

# --- torch


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write(mmap: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch.load")
    weights = random_bits(SMALL, ["f64", "f32", "f16", "bf16"], seed=1)
    save_checkpoint(weights, tmp_path / "a.pth", "pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
    for name, expected in torch_dict(weights).items():
        shape = (1, 1, SMALL.n_embd) if "time_mix" in name else expected.shape
        assert loaded[name].shape == shape
        assert loaded[name].dtype == expected.dtype
        assert torch.equal(loaded[name].flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


def test_members_are_aligned_and_checksummed(tmp_path: Path) -> None:
    save_checkpoint(random_bits(SMALL, ["bf16", "f64"], seed=1), tmp_path / "a.pth", "pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        names = [entry.filename for entry in archive.infolist()]
    assert names[0] == "archive/data.pkl"
    array = load_checkpoint(tmp_path / "a.pth", scan=False)["head.weight"].read()
    assert array.ctypes.data % 64 == 0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("stored", ["f64", "f32", "f16", "bf16"])
def test_we_load_what_torch_writes(stored: str, protocol: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch.save")
    weights = random_bits(SMALL, [stored], seed=2)
    torch.save(torch_dict(weights), tmp_path / "a.pth", pickle_protocol=protocol)
    assert same(weights, load_checkpoint(tmp_path / "a.pth", scan=False))


@pytest.mark.parametrize(
    "form", ["parameter", "module", "ordered", "model", "state_dict", "transposed", "slice", "shared"]
)
def test_forms_of_a_state_dict(form: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch.save")
    weights = random_values()
    tensors = torch_dict(weights)
    if form == "transposed":
        tensors = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in tensors.items()}
        assert not tensors["emb.weight"].is_contiguous()
    elif form == "slice":
        tensors = {n: torch.stack([t, t + 1, t], dim=-1)[..., 0] for n, t in tensors.items()}
    elif form == "shared":
        whole = torch.cat([t.flatten() for t in tensors.values()])
        parts = whole.split([t.numel() for t in tensors.values()])
        tensors = {n: part.view(t.shape) for (n, t), part in zip(tensors.items(), parts, strict=True)}
    elif form in ("parameter", "module"):
        tensors = {n: torch.nn.Parameter(t) for n, t in tensors.items()}
    saved: Any = collections.OrderedDict(tensors) if form == "ordered" else tensors
    if form == "module":  # a module's state dict carries _metadata, which is pickled as the state of the dict
        saved = _module_state(torch, tensors)
    if form in ("model", "state_dict"):
        saved = {form: saved, "epoch": 3, "loss": 1.5, "log": [None, True, "text"]}
    torch.save(saved, tmp_path / "a.pth")
    assert same(weights, load_checkpoint(tmp_path / "a.pth"))


def _module_state(torch: Any, tensors: dict[str, Any]) -> Any:
    state = torch.nn.Linear(1, 1).state_dict()
    assert state._metadata
    state.clear()
    state.update(tensors)
    return state


def test_the_rwkv_package_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    pytest.importorskip("torch", reason="the rwkv package runs on torch")
    rwkv = pytest.importorskip("rwkv.model", reason="loads our .pth with the rwkv package")
    weights = synthetic(Config(n_layer=2, n_embd=64, n_ffn=256, n_vocab=50))
    save_checkpoint(weights, tmp_path / "a.pth", "pth", "fp32")  # of an fp16 file the package keeps an fp16 ln0(emb)
    logits, _ = rwkv.RWKV(model=str(tmp_path / "a"), strategy="cpu fp32", verbose=False).forward([1, 2, 3], None)
    np.testing.assert_allclose(logits.numpy(), forward(weights, [1, 2, 3])[0], rtol=1e-4, atol=1e-4)


# --- safetensors


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    import safetensors

    weights = random_bits(SMALL, ["f16", "f32", "f64"], seed=3)
    save_checkpoint(weights, tmp_path / "a.safetensors", "safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        for name, tensor in weights.items():
            assert file.get_tensor(name).tobytes() == tensor.read().tobytes()


@pytest.mark.parametrize("names", ["blinkdl", "hf"])
def test_we_read_what_the_safetensors_library_writes(names: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    weights = random_bits(SMALL, ["f16", "f32", "f64"], seed=3)
    renamed = {hf_name(n) if names == "hf" else n: v for n, v in arrays(weights).items()}
    save_file(renamed, tmp_path / "a.safetensors", metadata={"format": "np", "who": "me"})
    read = load_checkpoint(tmp_path / "a.safetensors", scan=False)
    assert same(weights, read)
    assert read.metadata == {"format": "np", "who": "me"}


# --- Hugging Face


def _transformers() -> Any:
    pytest.importorskip("torch", reason="transformers runs on torch")
    return pytest.importorskip("transformers", reason="compares with transformers")


@pytest.mark.parametrize("rescale_every", [0, 1, 6])
def test_transformers_computes_the_same(rescale_every: int, tmp_path: Path) -> None:
    transformers = _transformers()
    import torch

    weights = synthetic(Config(n_layer=2, n_embd=16, n_ffn=48, n_vocab=20, rescale_every=rescale_every))
    save_checkpoint(weights, tmp_path / "hf", "hf", "fp32")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", local_files_only=True, output_loading_info=True
    )
    assert not any(report.values())
    assert model.config.rescale_every == rescale_every
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[1, 2, 3, 4]])).logits[0]
    np.testing.assert_allclose(logits.numpy(), forward(weights, [1, 2, 3, 4], all_logits=True)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shard", ["5GB", "1KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_we_read_what_transformers_writes(safe: bool, shard: str, tied: bool, tmp_path: Path) -> None:
    transformers = _transformers()
    settings = {"vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 2, "intermediate_size": 8}
    config = transformers.RwkvConfig(**settings, tie_word_embeddings=tied, rescale_every=3)
    model = transformers.RwkvForCausalLM(config)
    model.save_pretrained(tmp_path / "hf", safe_serialization=safe, max_shard_size=shard)
    assert any(name.endswith(".index.json") for name in os.listdir(tmp_path / "hf")) == (shard == "1KB")
    read = load_checkpoint(tmp_path / "hf")
    assert read.config == Config(2, 4, 8, 10, rescale_every=3)
    for name, tensor in model.state_dict().items():
        ours = read[blinkdl_name(name)]
        np.testing.assert_array_equal(ours.array(), tensor.numpy().reshape(ours.shape))
    assert np.array_equal(read["head.weight"].array(), read["emb.weight"].array()) == tied
