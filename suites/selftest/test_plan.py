"""Cells of a request, reasons for what cannot be one, and the exit status that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import index
from backends.api import BackendInfo
from harness import places
from harness import plan as plan_module
from harness.hardware import Hardware
from harness.places import UnknownDevice
from harness.plan import ALL, Plan, Request, UnknownScheme, memory_needed, plan
from harness.rows import Row
from harness.status import Ran, exit_code, ran, row_code, unmet
from reference.config import Config, count_parameters
from reference.errors import InputError
from reference.numerics import Arithmetic

CPU, GPU = Hardware("cpu", "cpu", "a CPU"), Hardware("h200", "cuda:0", "NVIDIA H200")


class Backend:
    """A backend that only says what it is."""

    def __init__(self, devices: tuple[str, ...], schemes: tuple[str, ...]) -> None:
        self.INFO = BackendInfo("b", "", "", devices, {scheme: Arithmetic() for scheme in schemes})


FAKE: dict[str, Any] = {
    "one": Backend(("cpu",), ("fp32", "Q4_0")),
    "two": Backend(("cpu", "cuda"), ("fp32", "own_int4")),
    "gpu": Backend(("cuda",), ("fp16",)),
}


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three backends, and a machine with a CPU and an H200."""

    def load(name: str) -> Any:
        if name not in FAKE:
            raise index.UnknownBackend(f"{name} cannot be imported")
        return FAKE[name]

    monkeypatch.setattr(plan_module, "backend_names", lambda: [*FAKE, "broken"])
    monkeypatch.setattr(plan_module, "load_backend", load)
    here = {"local": [CPU, GPU], ALL: [CPU, GPU], "cpu": [CPU], "h200": [GPU], "a800": []}
    monkeypatch.setattr(places, "resolve", lambda name: here[name])
    monkeypatch.setattr(places, "local_hardware", lambda: (CPU, GPU))


def cells(planned: Plan) -> list[str]:
    return [f"{cell.backend} {cell.scheme} {cell.hardware.device}" for cell in planned.cells]


def test_all_is_every_backend_with_its_schemes_where_it_runs() -> None:
    planned = plan(Request())
    assert cells(planned) == [
        "one fp32 cpu",
        "one Q4_0 cpu",
        "two fp32 cpu",
        "two own_int4 cpu",
        "two fp32 cuda:0",
        "two own_int4 cuda:0",
        "gpu fp16 cuda:0",
    ]
    (broken,) = planned.refused
    assert (broken.backend, broken.verdict, broken.by_name) == ("broken", "UNAVAILABLE", False)


def test_a_name_given_twice_is_one_cell() -> None:
    request = Request(
        models=("tiny", "tiny"), backends=("one", "one"), schemes=("fp32", "f32", "fp32"), hardware=("cpu", "local")
    )
    assert cells(plan(request)) == ["one fp32 cpu"]


def test_a_class_is_every_scheme_of_it() -> None:
    request = Request(backends=("one",), schemes=("int4", "f32"), hardware=("cpu",))
    assert cells(plan(request)) == ["one fp32 cpu", "one Q4_0 cpu"]


def test_all_models_are_the_embedded_one_and_every_preset() -> None:
    planned = plan(Request(models=(ALL,), backends=("one",), schemes=("fp32",), hardware=("cpu",)))
    models = [cell.model for cell in planned.cells]
    assert models[:2] == ["tiny", "169m"]
    assert "14b-world" in models


def test_a_scheme_that_one_of_all_backends_lacks_is_no_failure() -> None:
    planned = plan(Request(schemes=("Q4_0",), hardware=("cpu",)))
    assert cells(planned) == ["one Q4_0 cpu"]
    assert [(r.backend, r.by_name) for r in planned.refused] == [("broken", False), ("two", False), ("gpu", False)]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(backends=("one",), schemes=("fp32", "fp16")), "one has no scheme fp16; it has fp32, Q4_0"),
        (Request(schemes=("fp32", "int3")), "one has no scheme int3; it has fp32, Q4_0"),
        (Request(backends=("gpu",), hardware=("cpu",)), "gpu does not run on cpu; it runs on cuda"),
    ],
)
def test_what_was_named_and_cannot_be_is_refused_by_name(request_: Request, reason: str) -> None:
    refused = [refusal.reason for refusal in plan(request_).refused if refusal.by_name]
    assert reason in refused


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (Request(schemes=("Q4_O",)), UnknownScheme, "did you mean 'Q4_0'"),
        (Request(schemes=("OWN_INT4",)), UnknownScheme, "did you mean 'own_int4'"),
        (Request(devices=("cdua",)), UnknownDevice, "did you mean 'cuda'"),
        (Request(devices=("cuda:-1",)), UnknownDevice, "cuda:1 is the second GPU"),
        (Request(hardware=("h200",), devices=("cpu",)), UnknownDevice, "h200 has no device cpu; its devices: cuda:0"),
        (Request(models=("71b",)), InputError, "did you mean '7b'"),
        (Request(backends=("broken",)), index.UnknownBackend, "cannot be imported"),
    ],
)
def test_a_wrong_name_raises(request_: Request, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        plan(request_)


def test_devices_choose_among_the_hardware() -> None:
    assert cells(plan(Request(backends=("two",), schemes=("fp32",), devices=("cuda",)))) == ["two fp32 cuda:0"]
    # One that nobody has detected is for the backend to refuse.
    assert cells(plan(Request(backends=("two",), schemes=("fp32",), devices=("cuda:3",)))) == ["two fp32 cuda:3"]


def test_hardware_that_is_not_here_is_absent() -> None:
    planned = plan(Request(hardware=("a800", "cpu"), backends=("one",)))
    assert planned.absent == ("a800",)
    assert planned.cells
    assert plan(Request(hardware=("a800",))) == Plan((), (), ("a800",))


def test_explicit_means_nothing_came_from_all() -> None:
    assert Request(backends=("one",), schemes=("fp32",), hardware=("cpu",)).explicit
    assert Request(backends=("one",), schemes=("fp32",), devices=("cpu",)).explicit
    assert not Request(backends=("one",), schemes=("fp32",)).explicit
    assert not Request(backends=("one",), hardware=("cpu",)).explicit


def test_memory_grows_with_the_prompt_and_counts_what_the_backend_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(prompt: int, model: str = "tiny", batch: int = 1) -> int:
        from harness.measure import Workload

        request = Request(models=(model,), backends=("one",), schemes=("Q4_0",), workload=Workload(prompt, 1, batch))
        return memory_needed(plan(request).cells[0], config)

    config = Config(2, 512, 2048, 1000)
    assert needed(10_000) - needed(1) == 9_999 * 4 * (3 * 2048 + 8 * 512)
    activations = 100 * (3 * 2048 + 8 * 512)
    assert needed(100, batch=3) - needed(100) == 4 * 2 * (activations + 2 * 5 * 2 * 512 + 1000)  # two states, logits
    assert needed(1, "169m") - needed(1) == 2 * count_parameters(config)  # synthetic weights are held
    stored = needed(1)
    monkeypatch.setattr(
        FAKE["one"], "resident_bytes", lambda config, scheme: 4 * count_parameters(config), raising=False
    )
    assert needed(1) > stored + 3 * count_parameters(config)


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4])))
def test_the_first_of_2_4_1_3_wins(codes: list[int]) -> None:
    order = [2, 4, 1, 3, 0]
    assert exit_code(codes) == min([*codes, 0], key=order.index)


def row(verdict: str, scheme: str = "fp32", device: str = "cpu") -> Row:
    return Row(
        kind="recorded",
        hardware=device,
        backend="one",
        model="tiny",
        scheme=scheme,
        device=device,
        metric="parity",
        verdict=verdict,
        reason="because",
    )


@pytest.mark.parametrize(
    ("verdict", "named", "all_"),
    [
        ("PASS", 0, 0),
        ("FAIL", 1, 1),
        ("CRASHED", 4, 4),
        ("TIMEOUT", 4, 4),
        ("UNAVAILABLE", 3, 0),
        ("UNSUPPORTED", 3, 0),
    ],
)
def test_what_all_expands_to_and_is_not_usable_does_not_count(verdict: str, named: int, all_: int) -> None:
    assert (row_code(row(verdict), True), row_code(row(verdict), False)) == (named, all_)


def test_a_name_that_no_cell_answers_is_unmet() -> None:
    found = ran([row("PASS", "Q4_0"), row("FAIL"), row("UNAVAILABLE", "fp16", "cuda")])
    assert found == {Ran("one", "tiny", "Q4_0", "cpu", "cpu"), Ran("one", "tiny", "fp32", "cpu", "cpu")}
    request = Request(
        models=("tiny", "7b"),
        backends=("one", "two"),
        schemes=("int4", "fp16", ALL),
        devices=("cpu", "cuda"),
        hardware=("local", "cpu", "a800"),
    )
    missing = ["--backend two", "--model 7b", "--quant fp16", "--device cuda"]
    assert unmet(request, found, ("a800",)) == missing
    assert unmet(Request(), found) == []


def test_a_model_path_is_checked_with_the_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.pth"):
        plan(Request(models=(str(tmp_path / "gone.pth"),)))
