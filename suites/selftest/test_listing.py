"""``rwkv-bench list``: complete, true, quick, and without any runtime."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.api import BackendInfo, Unavailable
from backends.index import UnknownBackend
from harness import hardware, listing
from harness.hardware import Hardware
from reference.numerics import Arithmetic
from reference.schemes import SCHEMES
from reports.records import as_json, as_text
from suites.selftest.conftest import Done

ROOT = Path(__file__).parents[2]


def module(**names: Any) -> Any:
    info = BackendInfo("x", "a test", "here", ("cpu",), {"fp32": Arithmetic(), "own4": Arithmetic()})
    return SimpleNamespace(INFO=info, load=None, **names)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Backends to list instead of ours, by name."""
    modules: dict[str, Any] = {}

    def load(name: str) -> Any:
        if isinstance(modules[name], Exception):
            raise modules[name]
        return modules[name]

    monkeypatch.setattr(listing, "backend_names", lambda: list(modules))
    monkeypatch.setattr(listing, "load_backend", load)
    return modules


def missing() -> None:
    raise Unavailable("x is not installed", "pip install x")


def broken() -> None:
    raise OSError("libx.so: cannot open shared object file")


def test_a_backend_is_ready_or_says_how_to_get_it(found: dict[str, Any]) -> None:
    found["ready"] = module()
    found["missing"] = module(check=missing)
    found["broken"] = module(check=broken)
    found["gone"] = UnknownBackend("gone (pkg.gone): importing it raised ImportError: no pkg")
    status = {record["name"]: record["status"] for record in listing.collect("backends")["backends"]}
    assert status == {
        "ready": "ready",
        "missing": "x is not installed; pip install x",
        "broken": "broken: check() raised OSError: libx.so: cannot open shared object file",
        "gone": "gone (pkg.gone): importing it raised ImportError: no pkg",
    }


def test_schemes_name_their_backends_and_those_without_a_codec_say_so(found: dict[str, Any]) -> None:
    found["x"] = module()
    found["gone"] = UnknownBackend("gone")
    schemes = {record["name"]: record for record in listing.collect("schemes")["schemes"]}
    assert schemes["fp32"]["backends"] == ["x"]
    assert schemes["Q4_0"]["backends"] == []
    assert schemes["Q4_0"]["class"] == "int4"
    for name in ("own4", "Q4_K"):
        assert schemes[name]["unquantized"] == "unknown: no kernel parity"


def test_schemes_show_what_is_stored(found: dict[str, Any]) -> None:
    schemes = {record["name"]: record for record in listing.collect("schemes")["schemes"]}
    assert list(schemes) == list(SCHEMES)
    shown = {name: [schemes[name][key] for key in ("bits", "group", "scales", "system")] for name in schemes}
    assert shown["fp32"] == [32, None, None, "any"]
    assert shown["q3f16_0"] == [3.71, 40, "f16", "MLC"]
    assert shown["q4f32_1"] == [5, 32, "f32", "MLC"]
    assert shown["Q4_3"] == [6, 16, "f16+min", "rwkv.cpp"]
    assert shown["fp32i8"] == [8.13, "axis", "f32+min", "ChatRWKV"]
    assert schemes["q4f16_2"]["unquantized"] == ["embedding", "head", "vectors"]
    json.dumps(schemes)


def test_schemes_are_one_table_where_the_longest_names_fit() -> None:
    lines = as_text(listing.collect("schemes"), 106).splitlines()
    assert lines[1].split() == ["name", "class", "bits", "group", "scales", "unquantized", "system", "backends"]
    assert max(map(len, lines)) <= 106
    starts = [line for line in lines[2:] if line[2] != " "]
    assert [line[2 : lines[1].index("class")].strip() for line in starts][: len(SCHEMES)] == list(SCHEMES)


def test_schemes_are_a_block_each_at_80_columns() -> None:
    """Names are never broken, and ONNX Runtime's take up to 31 columns."""
    text = as_text(listing.collect("schemes"), 80)
    assert max(map(len, text.splitlines())) <= 80
    blocks = [
        dict(line.split(maxsplit=1) for line in block.splitlines() if line[2] != " ")
        for block in text.removeprefix("schemes:\n").strip("\n").split("\n\n")
    ]
    assert [block["name"] for block in blocks][: len(SCHEMES)] == list(SCHEMES)
    shown = next(block for block in blocks if block["name"] == "ort_int4_g32_asym_head8_int8act")
    assert [shown[key] for key in ("class", "bits", "group", "scales")] == ["int4", "5.12", "32", "f32+zero"]
    assert [shown[key] for key in ("unquantized", "system")] == ["embedding, vectors", "ONNX Runtime"]


def test_hardware_here_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    here = (Hardware("cpu", "cpu", "Some CPU"), Hardware("h200", "cuda:0", "NVIDIA H200"))
    monkeypatch.setattr(listing, "local_hardware", lambda: here)
    records = listing.collect("hardware")["hardware"]
    assert [record["name"] for record in records if record["here"]] == ["cpu", "h200"]
    assert [record["name"] for record in records].count("h200") == 1
    assert records[-1]["here"] is False


@pytest.mark.parametrize(
    ("detail", "name"),
    [
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 3060 Ti", "rtx3060ti"),
        ("Apple M2 Pro", "m2pro"),
        ("Apple M2", "m2"),
        ("Some New GPU (2 GiB)", "some-new-gpu-2-gib"),
    ],
)
def test_short_names_of_hardware(detail: str, name: str) -> None:
    assert hardware.short_name(detail) == name


def test_models_have_the_sizes_of_the_paper() -> None:
    models = {record["name"]: record for record in listing.collect("models")["models"]}
    assert models["169m"]["parameters"] == 169_342_464
    assert models["7b-world"]["vocabulary"] == 65536
    assert models["14b"]["layers"] == 40


def test_text_is_aligned_and_json_is_one_document(bench: Callable[..., Done]) -> None:
    done = bench("list", "--format", "json")
    assert done.code == 0
    document = json.loads(done.out)
    assert set(document) == {"schema", "backends", "schemes", "hardware", "models"}
    assert document["backends"][0]["name"] == "numpy"
    text = bench("list", "schemes").out.splitlines()
    assert text[0] == "schemes:"
    column = text[1].index("class")
    assert {line[column - 1] for line in text[1:]} == {" "}
    assert bench("list").out.count(":\n") == 4


def test_records_of_different_fields_are_one_table() -> None:
    assert as_text({"a": [{"x": 1, "y": [1, 2]}, {"x": 2_000_000, "z": True}]}) == (
        "a:\n  x    y     z\n  1    1, 2\n  2 M        yes\n"
    )
    assert json.loads(as_json({"a": [{"x": None}]})) == {"schema": 1, "a": [{"x": None}]}


@pytest.mark.parametrize("width", [80, 100, 200])
def test_columns_are_wrapped_to_the_terminal(width: int) -> None:
    lines = as_text(listing.collect(None), width).splitlines()
    assert max(map(len, lines)) <= width
    assert {"backends:", "schemes:", "hardware:", "models:"} <= set(lines)
    words = set(as_text(listing.collect(None)).split())
    assert words == set(" ".join(lines).split())


def test_it_imports_no_runtime_and_takes_half_a_second() -> None:
    heavy = ("torch", "pandas", "matplotlib", "tokenizers", "rich", "transformers")
    code = (
        "import sys, harness.cli; status = harness.cli.main(['list']);"
        f"print(*(m for m in {heavy} if m in sys.modules), file=sys.stderr); sys.exit(status)"
    )

    def once(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stderr.strip() == ""
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # In units of importing numpy, 0.09 s of an idle machine: what others do to this one is not its fault.
    listing, numpy = zip(*[(once(code), once("import numpy")) for _ in range(3)], strict=True)
    assert min(listing) < 5.5 * min(numpy)
