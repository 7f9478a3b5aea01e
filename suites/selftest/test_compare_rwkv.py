"""The comparison script: what it prints, and that it never prints the speed of a wrong answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reference.numerics import Arithmetic
from suites.throughput import compare_rwkv as script


class Counting:
    """A session that does nothing but count its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, tokens: Any, state: Any) -> tuple[np.ndarray, Any]:
        self.calls += 1
        return np.zeros(3, np.float32), state


def system(name: str, **more: Any) -> script.System:
    return script.System(name, "fp32", Counting(), Arithmetic(), **more)


def test_ratio_is_of_the_medians_to_the_package() -> None:
    base = system("rwkv", decode=[2.0, 1.0, 4.0], prefill=[4.0, 4.0, 4.0])
    ours = system("torch", decode=[1.0, 0.5, 2.0], prefill=[1.0, 2.0, 8.0])
    _, first, second = script.table([base, ours]).splitlines()
    assert first.split() == ["rwkv", "fp32", "16.0", "(8.0-32.0)", "1.00", "64.0", "(64.0-64.0)", "1.00"]
    assert second.split() == ["torch", "fp32", "32.0", "(16.0-64.0)", "2.00", "128.0", "(32.0-256.0)", "2.00"]


def test_a_wrong_system_has_no_speed_and_a_wrong_package_no_ratio() -> None:
    base = system("rwkv", problem="decode: NaN")
    ours = system("torch", decode=[1.0], prefill=[1.0])
    _, first, second = script.table([base, ours]).splitlines()
    assert "FAIL: decode: NaN" in first
    assert second.split() == ["torch", "fp32", "32.0", "(32.0-32.0)", "-", "256.0", "(256.0-256.0)", "-"]


def test_every_round_times_every_system_once_after_a_warm_up() -> None:
    systems = [system("a"), system("b"), system("c")]
    script.measure(systems, [1, 2, 3], rounds=5)
    assert [(len(s.decode), len(s.prefill)) for s in systems] == [(5, 5)] * 3
    assert [s.session.calls for s in systems] == [6 * (1 + script.DECODE_TOKENS)] * 3  # type: ignore[attr-defined]


def test_without_the_package_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: None if name == "rwkv" else object())
    assert script.main([]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "pip install" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--rounds", "4"], ["--threads", "0"], ["--schemes", "fp32,int4"]])
def test_bad_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(arguments)
    assert caught.value.code == 2


def test_an_unknown_model_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: object())
    assert script.main(["--model", "170m"]) == 2
    assert "169m" in capsys.readouterr().err
