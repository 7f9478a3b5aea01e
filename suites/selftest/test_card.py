"""A card as nvidia-smi tells it, what does not fit on it, and who else is there; with stand-ins for the program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends import torch_eager
from harness import cli, fitting
from harness.budget import GIB, device_bytes, device_shortage
from harness.card import Card, Process, card_of, chosen, parse, warning
from harness.cell_rows import Job, base_row
from harness.cuda_order import numbered
from harness.hardware import Hardware, describe, local_hardware
from harness.machine.facts import facts as machine_facts
from harness.measure import Workload
from harness.models import open_model
from harness.plan import Cell, Request
from harness.rows import Row
from reference.config import preset

CARDS = """\
0, GPU-aaaa-1, NVIDIA H200, 142000, 143771, 1980, 3201, 570.124.06
1, GPU-bbbb-2, NVIDIA GeForce RTX 3060 Ti, 2048, 8192, 210, [N/A], 570.124.06
"""
FACTS = """\
NVIDIA H200, 570.124.06, 143771, 1980, 3201, 700.00, 9.0
NVIDIA GeForce RTX 3060 Ti, 570.124.06, 8192, 2100, 7001, 200.00, 8.6
"""
PROCESSES = """\
GPU-bbbb-2, 4711, /opt/a, b/bin/python3, 3072
GPU-bbbb-2, 4712, [Not Found], [N/A]
GPU-bbbb-2, 99, /usr/bin/python3, 100
"""


def cards() -> list[Card]:
    return parse(CARDS, PROCESSES, own={99})


def test_what_nvidia_smi_prints_is_read() -> None:
    first, second = cards()
    assert (first.free_bytes, first.total_bytes, first.clock_mhz) == (142000 << 20, 143771 << 20, 1980)
    assert first.others == ()
    assert second.memory_clock_mhz is None
    assert second.others == (Process(4711, "/opt/a, b/bin/python3", 3 << 30), Process(4712, "[Not Found]", None))
    assert second.detail() == {
        "driver": "570.124.06",
        "free_bytes_before": 2 << 30,
        "clock_mhz": 210,
        "other_processes": ["python3 (pid 4711, 3.0 GiB)", "[Not Found] (pid 4712)"],
    }
    assert "other_processes" not in first.detail()


@pytest.mark.parametrize(
    "said",
    ["", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", "No devices found\n"],
)
def test_a_driver_that_does_not_answer_has_no_cards(said: str) -> None:
    assert parse(said, said, set()) == []


@pytest.mark.parametrize(
    ("device", "visible", "index"),
    [
        ("cuda", None, 0),
        ("cuda:1", None, 1),
        ("cuda:2", None, None),
        ("cuda", "1", 1),
        ("cuda:1", "1,0", 0),
        ("cuda:0", "GPU-bbbb", 1),
        ("cuda:0", "", None),
        ("cuda:1", "1,7,0", None),
    ],
)
def test_which_card_a_device_is(device: str, visible: str | None, index: int | None) -> None:
    told = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = chosen(cards(), device, told)
    assert (found and found.index) == index


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for nvidia-smi on a machine with two cards."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f"*compute-apps*) cat <<E\n{PROCESSES}E\n;;\n"
        "*=uuid) echo GPU-aaaa-1; echo GPU-bbbb-2;;\n"
        f"*power.limit*) cat <<E\n{FACTS}E\n;;\n"
        f"*) cat <<E\n{CARDS}E\n;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _forget()
    yield program
    _forget()


def _forget() -> None:
    local_hardware.cache_clear()
    machine_facts.cache_clear()


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["h200", "rtx3060ti"]),
        ("1", ["rtx3060ti"]),
        ("1,0", ["rtx3060ti", "h200"]),
        ("GPU-bbbb", ["rtx3060ti"]),
        ("GPU-bbbb,0", ["rtx3060ti", "h200"]),
        ("1,7,0", ["rtx3060ti"]),
        ("", []),
    ],
)
@pytest.mark.usefixtures("program")
def test_a_device_is_named_after_the_card_that_cuda_gives(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a row is recorded under, what is told of it, and whose memory was asked for are one card's."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = local_hardware()[1:]
    assert [(gpu.name, gpu.device) for gpu in gpus] == [(name, f"cuda:{i}") for i, name in enumerate(names)]
    for gpu in gpus:
        card = card_of(gpu.device)
        assert card is not None
        assert gpu.detail == card.name
        assert describe(gpu)["device_memory_bytes"] == card.total_bytes
    assert card_of(f"cuda:{len(gpus)}") is None


@pytest.mark.usefixtures("program")
def test_a_card_that_is_not_known_for_certain_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    first, second = local_hardware()[1:]
    assert (first.name, first.device, second.device) == ("nvidia-gpu", "cuda:0", "cuda:1")
    assert first.detail == "one of NVIDIA H200, NVIDIA GeForce RTX 3060 Ti: CUDA_DEVICE_ORDER is not PCI_BUS_ID"
    assert card_of("cuda:0") is None
    assert "driver" not in describe(first)
    _forget()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb")  # a UUID is certain under any order
    assert [gpu.name for gpu in local_hardware()[1:]] == ["rtx3060ti"]
    assert card_of("cuda:0") is not None
    _forget()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-4711")
    assert [gpu.detail for gpu in local_hardware()[1:]] == [
        "one of NVIDIA H200, NVIDIA GeForce RTX 3060 Ti: CUDA_DEVICE_ORDER is not PCI_BUS_ID"
    ]


@pytest.mark.usefixtures("program")
def test_the_order_is_settled_unless_the_user_has_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry point, before any runtime: CUDA's own order is the fastest first."""
    for asked, kept in ((None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")):
        if asked is None:
            monkeypatch.delenv("CUDA_DEVICE_ORDER")
        else:
            monkeypatch.setenv("CUDA_DEVICE_ORDER", asked)
        assert cli.main(["--version"]) == 0
        assert os.environ["CUDA_DEVICE_ORDER"] == kept


def test_of_one_card_there_is_no_order() -> None:
    assert numbered(["GPU-a"], {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}) == [0]
    assert numbered(["", ""], {"CUDA_VISIBLE_DEVICES": "GPU-a,1"}) == [None, 1]
    assert numbered(["GPU-ab", "GPU-ac"], {"CUDA_VISIBLE_DEVICES": "GPU-a"}) == []


def test_the_program_is_asked(program: Path) -> None:
    found = card_of("cuda:1")
    assert found is not None
    assert [process.pid for process in found.others] == [4711, 4712, 99]
    assert card_of("cpu") is None
    assert card_of("mps") is None
    program.write_text("#!/bin/sh\nexit 9\n")
    assert card_of("cuda:1") is None


# --- memory


def shortage(model: str, scheme: str, free: float, device: str = "cuda") -> str | None:
    card = Card(0, "GPU", "NVIDIA A800", int(free * GIB), 80 * GIB, None, None, "570")
    return device_shortage(preset(model), scheme, torch_eager, 256, device, card)


def test_what_does_not_fit_says_what_would() -> None:
    assert shortage("7b", "fp16", 20) is None
    assert shortage("7b", "fp32", 20) == (
        "needs about 28.3 GiB on cuda (NVIDIA A800), 20.0 of 80.0 GiB are free; fp16, bf16 would fit"
    )
    assert "; in fp16, 3b would fit" in str(shortage("7b", "fp16", 10))
    assert "; in fp16, 3b-world would fit" in str(shortage("7b-world", "fp16", 10))
    assert "; no other scheme and no smaller shape would fit" in str(shortage("7b", "fp16", 0.1))


def test_what_would_fit_counts_the_batch_of_that_shape() -> None:
    card = Card(0, "GPU", "NVIDIA A800", 24 * GIB, 80 * GIB, None, None, "570")
    for batch, shape in ((1, "3b"), (16, "3b"), (64, "430m")):
        said = device_shortage(preset("14b"), "fp32", torch_eager, 2048, "cuda", card, batch)
        assert said is not None
        assert f"; in fp32, {shape} would fit" in said


def test_it_fits_from_the_byte_on_that_is_needed() -> None:
    needed = device_bytes(preset("1b5"), "fp16", torch_eager, 256)
    assert 2 * 1_515_106_304 < needed < 2 * 1_515_106_304 + GIB
    card = Card(0, "GPU", "x", needed, None, None, None, "570")
    assert device_shortage(preset("1b5"), "fp16", torch_eager, 256, "cuda", card) is None
    assert device_shortage(preset("1b5"), "fp16", torch_eager, 256, "cuda", card, batch=2) is not None
    card = Card(0, "GPU", "x", needed - 1, None, None, None, "570")
    assert device_shortage(preset("1b5"), "fp16", torch_eager, 256, "cuda", card) is not None


def test_nothing_is_claimed_where_nobody_tells() -> None:
    unknown = Card(0, "GPU", "x", None, None, None, None, "570")
    assert device_shortage(preset("14b"), "fp32", torch_eager, 256, "cuda", unknown) is None
    assert device_shortage(preset("14b"), "fp32", torch_eager, 256, "cuda", None) is None


# --- a run


def fitted(card: Card, monkeypatch: pytest.MonkeyPatch) -> tuple[Row, str | None]:
    monkeypatch.setattr(fitting, "card_of", lambda device: card)
    cell = Cell("tiny", "torch", "fp16", Hardware("a800", "cuda:0", "NVIDIA A800"), 1, Workload(8, 1))
    model = open_model("tiny")
    return fitting.fitted(base_row(cell, model, Job(Request(), None, "run")), cell, model)


def test_a_cell_too_large_for_its_card_is_not_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    row, short = fitted(Card(0, "GPU", "NVIDIA A800", 1 << 20, 80 * GIB, 1410, 1593, "570"), monkeypatch)
    assert "needs about 0.7 GiB on cuda:0 (NVIDIA A800), 0.0 of 80.0 GiB are free" in str(short)
    assert (row.hardware_detail or {})["free_bytes_before"] == 1 << 20


def test_somebody_else_on_the_card_is_warned_of_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Process(7, "/usr/bin/blender", 3 * GIB)
    card = Card(0, "GPU", "NVIDIA A800", 70 * GIB, 80 * GIB, 1410, 1593, "570", (other,))
    assert warning("cuda:0", None) is None
    with pytest.warns(UserWarning, match=r"blender \(pid 7, 3.0 GiB\) also on cuda:0 \(NVIDIA A800\): speeds may be"):
        row, short = fitted(card, monkeypatch)
    assert short is None
    detail = row.hardware_detail or {}
    assert detail["other_processes"] == ["blender (pid 7, 3.0 GiB)"]
    assert detail["clock_mhz"] == 1410
