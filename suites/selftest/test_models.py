"""Names of models, their content hash, their gate prompt; memory and time asked before anything is read."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from harness import budget, models
from harness.budget import hold, shortage
from harness.dry_run import duration
from harness.estimate import estimate
from harness.hardware import Hardware, available_bytes
from harness.measure import Sampling, Workload
from harness.models import (
    SPREAD,
    content_hash,
    gate_tokens,
    is_generated,
    looks_like_path,
    model_config,
    open_model,
)
from harness.names import did_you_mean
from harness.plan import Cell
from reference.config import Config
from reference.errors import InputError
from reference.synthetic import synthetic
from reference.weights import Tensor


@pytest.mark.parametrize(
    ("name", "near"),
    [("tny", "tiny"), ("1B5", "1b5"), ("168m", "169m"), ("7b-wrld", "7b-world")],
)
def test_a_wrong_name_offers_the_nearest(name: str, near: str) -> None:
    for ask in (model_config, open_model):
        if name == "1B5":
            assert model_config(name) == model_config("1b5")
            continue
        with pytest.raises(InputError, match=f"no model '{name}'; did you mean '{near}"):
            ask(name)


def test_a_name_like_nothing_lists_them_all() -> None:
    with pytest.raises(InputError) as caught:
        open_model("xyzzy")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in models.model_names())
    assert "the path of a checkpoint" in str(caught.value)


def test_did_you_mean_ignores_case() -> None:
    assert did_you_mean("H200", ["h100", "h200"]) == "did you mean 'h200'? "
    assert did_you_mean("q4_0", ["Q8_0", "Q4_0"]) == "did you mean 'Q4_0'? "
    assert did_you_mean("zzz", ["h100"]) == ""
    assert did_you_mean("zzz", []) == ""


@pytest.mark.parametrize(
    ("name", "path"),
    [("tiny", False), ("7b-world", False), ("./tiny", True), ("a/b", True), ("x.pth", True), ("x.safetensors", True)],
)
def test_what_is_a_path(name: str, path: bool) -> None:
    assert looks_like_path(name) == path
    assert is_generated(name) == (not path and name != "tiny")


def test_a_file_in_this_folder_is_a_path_without_a_slash(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(small, "checkpoint")
    assert open_model("checkpoint").config == model_config(small)


def test_opening_14b_reads_and_allocates_nothing() -> None:
    process, begun = psutil.Process(), time.process_time()
    before = process.memory_info().rss
    model = open_model("14b")
    assert process.memory_info().rss - before < 64 << 20
    assert time.process_time() - begun < 1
    assert model.weights.synthetic
    assert model.sha256 == open_model("14b").sha256
    assert len({model.sha256, open_model("14b", 1).sha256, open_model("14b-world").sha256}) == 3


@pytest.mark.usefixtures("state")
def test_synthetic_tensors_are_made_once_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(config: Config, seed: int) -> object:
        def count(name: str, tensor: Tensor) -> Tensor:
            def read() -> np.ndarray:
                made.append(name)
                return tensor.read()

            return replace(tensor, read=read)

        return synthetic(Config(1, 32, 64, 100), seed).map(count)

    monkeypatch.setattr(models, "synthetic", counted)
    for free, reads in ((1 << 40, 1), (0, 2)):
        monkeypatch.setattr(budget, "available_bytes", lambda free=free: free)
        weights = open_model("169m").weights
        made.clear()
        for _ in range(2):
            weights.tensors["emb.weight"].array()
        assert made.count("emb.weight") == reads


@pytest.fixture
def hashed(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    """Every list of files that is read to be hashed."""
    calls: list[list[Path]] = []
    real = models._hash_files

    def counted(files: list[Path]) -> str:
        calls.append(files)
        return real(files)

    monkeypatch.setattr(models, "_hash_files", counted)
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path / "cache"))
    return calls


def test_a_hash_is_remembered_until_the_file_changes(hashed: list[list[Path]], tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"one")
    first = content_hash(path)
    assert content_hash(path) == first
    assert len(hashed) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert content_hash(path) != first
    assert len(hashed) == 2


def test_a_folder_is_hashed_by_its_weights_and_config(hashed: list[list[Path]], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text(name)
    first = content_hash(folder)
    assert [file.name for file in hashed[0]] == ["config.json", "model.safetensors"]
    (folder / "README.md").write_text("changed")
    assert content_hash(folder) == first
    (folder / "config.json").write_text("changed")
    assert content_hash(folder) != first


def test_a_cache_that_cannot_be_written_only_costs_time(
    hashed: list[list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path / "file"))
    assert content_hash(tmp_path / "file") == content_hash(tmp_path / "file")
    assert len(hashed) == 2


def test_a_damaged_note_is_not_believed(hashed: list[list[Path]], tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"one")
    first = content_hash(path)
    (note,) = (tmp_path / "cache" / "sha256").iterdir()
    for damage in (b"", b"abc", b"\xff" * 64, first.encode()[:-1] + b"\n"):
        note.write_bytes(damage)
        assert content_hash(path) == first


def test_gate_tokens_are_text_where_there_is_a_tokenizer_and_ids_of_the_vocabulary_else(small: str) -> None:
    text = gate_tokens(open_model(small), 48)
    assert bytes(text[: SPREAD.start]).isascii()
    assert max(text[SPREAD]) > 127  # ids that text alone does not meet
    assert gate_tokens(open_model(small), 48, seed=1) != text
    assert gate_tokens(open_model(small), 300_000)[:48] == text
    assert text[36:38] == [255, 0]  # the ends of the vocabulary
    assert text[38] == text[39]  # one id twice in a row
    for n in (1, 36, 37, 38, 40):
        assert gate_tokens(open_model(small), n) == text[:n]
    assert len(gate_tokens(open_model(small), 300_000)) == 300_000
    other = replace(open_model("169m"), weights=synthetic(Config(1, 32, 64, 90), 0))
    ids = gate_tokens(other, 500, seed=1)
    assert (len(ids), min(ids) >= 0, max(ids) < 90) == (500, True, True)
    assert ids == gate_tokens(other, 500, seed=1) != gate_tokens(other, 500, seed=2)


def test_memory_is_the_least_of_the_systems_and_the_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory().available
    assert 0 < available_bytes() <= free * 1.1
    files = {"memory.max": "5000", "memory.current": "2000"}

    def read_text(path: Path) -> str:
        if path.name not in files:
            raise OSError
        return files[path.name]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_bytes() == 3000
    files["memory.current"] = "6000"
    assert available_bytes() == 0
    files["memory.max"] = "max"
    assert available_bytes() > 3000


def test_a_shortage_says_how_much_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_bytes", lambda: 3 << 30)
    assert shortage(3 << 30, "cpu") is None
    assert shortage(4 << 30, "cuda:0") is None  # the memory of the host is not asked of a GPU
    words = "needs about 4.0 GiB of memory, 3.0 GiB are free; try a smaller scheme or model"
    assert shortage(4 << 30, "cpu") == words


def test_weights_are_held_where_a_third_of_memory_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = synthetic(Config(1, 32, 64, 100), 0)
    for free, held in ((1 << 40, True), (0, False)):
        monkeypatch.setattr(budget, "available_bytes", lambda free=free: free)
        assert (hold(weights) is not weights) == held


def test_an_estimate_grows_with_the_model_and_the_work() -> None:
    cell = Cell("tiny", "numpy", "fp32", Hardware("cpu", "cpu", ""), 1, Workload(64, 16))
    sampling = Sampling(repeats=3, warmup=1, budget_s=20, minimum=3)
    verdict, run = estimate(cell, None), estimate(cell, sampling)
    large = estimate(replace(cell, model="1b5"), sampling)
    assert 0 < verdict.seconds < run.seconds < large.seconds
    assert run.bytes < large.bytes
    assert large.bytes > 6 << 30


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (99.6, "100 s"), (130, "2 min"), (7300, "2.0 h")]
)
def test_durations_as_people_read_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
