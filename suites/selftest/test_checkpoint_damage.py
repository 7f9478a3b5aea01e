"""Damaged and hostile files: refused, nothing executed, no memory taken on their word."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.config import Config
from reference.errors import CheckpointError
from reference.pth_pickle import PickleError, dumps, loads
from suites.selftest.checkpoint_files import (
    random_values,
    refusal,
    torch_dict,
)

# --- .pth


def _pth(path: Path, index: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", index)
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


class _Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_unexecuted(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _pth(tmp_path / "evil.pth", pickle.dumps({"emb.weight": _Exploit()}, protocol))
    assert "refused, nothing was run" in (message := refusal(path))
    assert f"{os.system.__module__}.system" in message or protocol == 0
    assert os.listdir(tmp_path) == ["evil.pth"]


@pytest.mark.parametrize(
    "index",
    [
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"(X\x01\x00\x00\x001ios\nsystem\n.",
        b"(cos\nsystem\nX\x02\x00\x00\x00lso.",
        b"\x80\x02\x82\x01.",
        b"ctorch.storage\n_load_from_bytes\n(X\x00\x00\x00\x00tR.",
        b"ctorch\nload\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"ccollections\nOrderedDict\n)\x81.",
    ],
)
def test_no_global_but_torchs_own(index: bytes) -> None:
    with pytest.raises(PickleError, match=r"(asks for|uses the pickle opcode).*refused"):
        loads(index)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b".",
        b"}",
        b"}u.",
        b"(}0.",
        b"Q.",
        b"}]s.",
        b"}(]Nu.",
        b"h\x05.",
        b"NNR.",
        b"ccollections\nOrderedDict\n(K\x01tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch._utils\n_rebuild_parameter\n(NNNtR.",
        b"(X\x07\x00\x00\x00storageX\x01\x00\x00\x000X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        b"K\x01(K\x02b.",
        b"X\xff\xff\xff\xffabc.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x00abc.",
        b"X\x01\x00\x00\x00\xff.",
        b"NK\x01e.",
    ],
)
def test_nonsense_pickles(index: bytes) -> None:
    with pytest.raises(PickleError):
        loads(index)


def test_a_pickle_cannot_ask_for_memory() -> None:
    # Python's own unpickler would make a memo of 2^31 entries here.
    index = b"}r\xff\xff\xff\x7f."
    tracemalloc.start()
    assert loads(index) == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (pickle.dumps([1, 2], 2), "holds a list; a dict of tensors by name is expected"),
        (pickle.dumps({"emb.weight": 3}, 2), r"entry emb\.weight is a int; a tensor is expected"),
        (pickle.dumps({"_strategy": "cpu fp32"}, 2), "already converted by the rwkv package"),
        (dumps([("emb.weight", "f32", (2, 2))]), r"tensor emb\.weight has no data in the archive"),
    ],
)
def test_pickles_that_are_no_state_dict(index: bytes, message: str, tmp_path: Path) -> None:
    assert message.replace("\\", "") in refusal(_pth(tmp_path / "a.pth", index))


def test_storages_and_views_are_checked(tmp_path: Path) -> None:
    index = dumps([("emb.weight", "f32", (2, 2))])
    short = _pth(tmp_path / "short.pth", index, **{"data/0": bytes(15)})
    assert "tensor emb.weight needs 16 bytes and the archive has 15" in refusal(short)
    # Stride and offset are the last two small integers before `False`.
    beyond = index.replace(b"J\x00\x00\x00\x00(", b"J\x01\x00\x00\x00(")
    message = refusal(_pth(tmp_path / "beyond.pth", beyond, **{"data/0": bytes(16)}))
    assert "tensor emb.weight of shape (2, 2) reaches outside its 4 stored elements" in message
    negative = index.replace(b"J\x00\x00\x00\x00(", b"J\xff\xff\xff\xff(")
    assert "in a way torch does not" in refusal(_pth(tmp_path / "negative.pth", negative, **{"data/0": bytes(16)}))


def test_an_expanded_view_claims_no_memory(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writes the .pth with torch.save")
    tensors = torch_dict(random_values())
    tensors["emb.weight"] = torch.zeros(1).expand(1 << 40, 4)
    torch.save(tensors, tmp_path / "a.pth")
    assert "tensor emb.weight of shape (1099511627776, 4) reaches outside" in refusal(tmp_path / "a.pth")


def test_archives_torch_does_not_write(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"}." * 100)
    assert "archive/data.pkl is compressed or encrypted" in refusal(tmp_path / "packed.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("word/document.xml", b"<xml/>")
    assert "not one of torch.save: it has 0 data.pkl" in refusal(tmp_path / "other.pth")
    big = _pth(tmp_path / "big.pth", dumps([]), byteorder=b"big")
    assert "big-endian" in refusal(big)
    huge = _pth(tmp_path / "huge.pth", bytes(17 << 20))
    assert "its data.pkl has 17825792 bytes" in refusal(huge)


def test_files_of_old_torch_and_other_types(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writes the .pth with torch.save")
    torch.save(torch_dict(random_values()), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "in torch's format before 1.6; load it in torch and torch.save it" in refusal(tmp_path / "old.pth")
    torch.save({"emb.weight": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "f8.pth")
    assert "asks for torch._utils._rebuild_tensor_v3" in refusal(tmp_path / "f8.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "asks for torch.nn.modules.linear.Linear" in refusal(tmp_path / "module.pth")


# --- damage anywhere


@pytest.fixture(scope="module", params=["pth", "torch", "safetensors", "ggml", "ggml Q5_1", "ggml Q4_1_O", "fr"])
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small checkpoint of one layer, written by us or by torch."""
    format, _, scheme = request.param.partition(" ")
    weights = random_values(Config(1, 32, 32, 4) if scheme else Config(n_layer=1, n_embd=2, n_ffn=3, n_vocab=4))
    path = tmp_path_factory.mktemp("intact") / "file"
    if format == "torch":
        torch = pytest.importorskip("torch", reason="writes the .pth with torch.save")
        file = io.BytesIO()
        torch.save(torch_dict(weights), file)
        return file.getvalue()
    save_checkpoint(weights, path, format, scheme or None)
    return path.read_bytes()


def test_a_truncated_file_is_always_refused(intact: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut"

    @settings(max_examples=150, deadline=None)
    @given(size=st.integers(0, len(intact) - 1))
    def check(size: int) -> None:
        path.write_bytes(intact[:size])
        refusal(path)

    check()


def test_flipped_bytes_load_or_are_refused(intact: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped"
    # Headers lie at the start of most formats, and the zip's directory at the end.
    where = st.integers(0, len(intact) - 1) | st.integers(0, 64) | st.integers(len(intact) - 64, len(intact) - 1)

    @settings(max_examples=250, deadline=None)
    @given(flips=st.lists(st.tuples(where, st.integers(1, 255)), min_size=1, max_size=3))
    def check(flips: list[tuple[int, int]]) -> None:
        data = bytearray(intact)
        for position, flip in flips:
            data[position] ^= flip
        path.write_bytes(data)
        _loads_or_refuses(path)

    check()


def _loads_or_refuses(path: Path) -> None:
    tracemalloc.start()
    with warnings.catch_warnings(), contextlib.suppress(CheckpointError):
        warnings.simplefilter("ignore")
        for tensor in load_checkpoint(path).values():
            assert tensor.array().shape == tensor.shape
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
