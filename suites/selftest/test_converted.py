"""What a runtime wants instead of the checkpoint: made once, named by content, whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reference.checkpoint import load_checkpoint
from reference.converted import content_key, converted, derived
from reference.errors import CheckpointError
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights
from suites.selftest.conftest import SMALL
from suites.selftest.processes import ROOT, eventually


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    return tmp_path / "converted"


@pytest.fixture
def weights() -> Weights:
    return synthetic(SMALL, 3)


def whole(path: Path) -> None:
    path.write_text("whole")


def never(path: Path) -> None:
    raise AssertionError(f"{path} is made again")


def left(cache: Path) -> list[str]:
    """Files that are neither results nor what is kept beside them."""
    kept = {f".{result.name}{ending}" for result in cache.glob("*/*") for ending in (".lock", ".sizes")}
    return [path.name for path in cache.rglob(".*") if path.name not in kept and path.suffix != ".lock"]


@pytest.mark.parametrize(("format", "folder"), [("safetensors", False), ("pth", False), ("hf", True)])
def test_a_format_is_written_once(format: str, folder: bool, weights: Weights, cache: Path) -> None:
    path = converted(weights, format, "fp32")
    assert path.is_dir() == folder
    before = path.stat().st_mtime_ns
    assert (converted(weights, format, "fp32"), path.stat().st_mtime_ns) == (path, before)
    for name, tensor in load_checkpoint(path).items():
        np.testing.assert_array_equal(tensor.array(), weights[name].array())
    assert left(cache) == []


def test_content_names_it_and_nothing_else(weights: Weights) -> None:
    assert content_key(weights) == content_key(replace(weights, source="elsewhere", metadata={"a": "b"}))
    keys = {content_key(weights), content_key(synthetic(SMALL, 4))}
    for change in (lambda a: a + np.float32(1e-3), lambda a: a.astype(np.float64)):
        keys.add(content_key(_changed(weights, "emb.weight", change)))
        keys.add(content_key(_changed(weights, "blocks.1.ln2.bias", change)))
    assert len(keys) == 6
    assert content_key(replace(weights, key="known")) == "known"


def _changed(weights: Weights, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Weights:
    return weights.map(lambda n, tensor: Tensor.of(change(tensor.array())) if n == name else tensor)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [RuntimeError("full"), KeyboardInterrupt()])
def test_one_that_fails_leaves_nothing(error: BaseException, kind: str, weights: Weights, cache: Path) -> None:
    def make(path: Path) -> None:
        assert not path.exists()
        assert path.parent.is_dir()
        if kind == "folder":
            path.mkdir()
            (path / "half").touch()
        else:
            path.write_text("half")
        raise error

    with pytest.raises(type(error)):
        derived(weights, "thing.bin", make)
    assert left(cache) == []
    assert derived(weights, "thing.bin", whole).read_text() == "whole"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b"x")])
@pytest.mark.parametrize(("format", "file"), [("pth", "."), ("hf", "model.safetensors"), ("hf", "config.json")])
def test_a_damaged_one_is_made_again(
    format: str, file: str, damage: Callable[[Path], None], weights: Weights, cache: Path
) -> None:
    path = converted(weights, format, "fp32")
    damage(path / file)
    assert converted(weights, format, "fp32") == path
    for name, tensor in load_checkpoint(path).items():
        np.testing.assert_array_equal(tensor.array(), weights[name].array())
    assert left(cache) == []


@pytest.mark.parametrize("sizes", [None, "", "[]", "{", '{"gone": 5}', "{}", '{".": "0"}'])
def test_one_whose_sizes_are_not_known_is_made_again(sizes: str | None, weights: Weights) -> None:
    path = derived(weights, "thing", Path.touch)
    listed = path.with_name(".thing.sizes")
    assert listed.read_text() == '{".": 0}'
    listed.unlink() if sizes is None else listed.write_text(sizes)
    assert derived(weights, "thing", whole).read_text() == "whole"
    assert derived(weights, "thing", never) == path


def test_a_folder_and_a_file_are_not_taken_for_each_other(weights: Weights) -> None:
    path = derived(weights, "thing", Path.mkdir)
    assert derived(weights, "thing", never).is_dir()
    (path / "a runtime's own").touch()
    assert derived(weights, "thing", never).is_dir()
    (path / "a runtime's own").unlink()
    path.rmdir()
    path.touch()
    assert derived(weights, "thing", Path.mkdir).is_dir()
    path.with_name(".thing.sizes").unlink()
    assert derived(weights, "thing", whole).is_file()
    path.unlink()
    path.mkdir()
    assert derived(weights, "thing", whole).is_file()


def test_all_of_it_is_on_the_disk_before_it_has_its_name(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int | str] = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def replaced(old: Path, new: Path) -> None:
        done.append(new.name)
        rename(old, new)

    def make(path: Path) -> None:
        (path / "b").mkdir(parents=True)
        (path / "a").write_text("a")
        (path / "b" / "c").write_text("c")

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", replaced)
    path = derived(weights, "thing", make)
    listed = path.with_name(".thing.sizes")
    assert set(done[:-3]) == {p.stat().st_ino for p in (path, path / "a", path / "b", path / "b" / "c", listed)}
    assert done[-3:] == [listed.name, path.name, path.parent.stat().st_ino]


def test_a_cache_that_cannot_be_written(weights: Weights, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, make: Callable[[Path], None]) -> str:
        with pytest.raises(CheckpointError) as caught:
            derived(weights, name, make)
        return str(caught.value)

    path = derived(weights, "there", whole)
    (path.parent / ".locked.lock").mkdir()
    said = f"the cache {cache.parent} cannot be written (Is a directory); set RWKV_BENCH_CACHE to a folder that can"
    assert refused("locked", whole) == said
    assert "(No such file or directory); set RWKV_BENCH_CACHE" in refused("nothing", lambda path: None)
    with pytest.raises(PermissionError, match="the maker's own"):
        derived(weights, "other", lambda path: (_ for _ in ()).throw(PermissionError("the maker's own")))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "(No space left on device)" in refused("thing", whole)
    assert left(cache) == []
    assert derived(weights, "there", never) == path
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(path))
    assert f"the cache {path} cannot be written (Not a directory); set" in refused("thing", whole)


def test_what_a_longer_name_is_being_made_of_is_left_alone(weights: Weights, cache: Path) -> None:
    def make(path: Path) -> None:
        path.write_text("longer")
        derived(weights, "thing", whole)
        assert path.exists()

    assert derived(weights, "thing.bin", make).read_text() == "longer"


def test_the_ending_is_kept_for_writers_that_look_at_it(weights: Weights) -> None:
    seen: list[str] = []

    def make(path: Path) -> None:
        seen.append(path.suffix)
        path.touch()

    assert derived(weights, "a model.param", make).name == "a model.param"
    assert seen == [".param"]


def test_two_that_want_it_at_once_make_it_once(weights: Weights) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.2)
        path.write_text("whole")

    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(derived(weights, "x", make).read_text())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), found) == (1, ["whole"] * 4)


def test_one_that_is_killed_leaves_nothing_usable(weights: Weights, cache: Path) -> None:
    code = (
        "import time; from reference.converted import derived; from reference.synthetic import synthetic; "
        "from suites.selftest.conftest import SMALL\n"
        "def make(path):\n    path.mkdir(); (path / 'half').touch(); time.sleep(100)\n"
        "derived(synthetic(SMALL, 3), 'thing', make)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        try:
            assert eventually(lambda: left(cache), 30)
        finally:
            process.send_signal(signal.SIGKILL)
    assert left(cache) != []
    assert derived(weights, "thing", whole).read_text() == "whole"
    assert left(cache) == []
