"""The torch backend on MPS, as far as a machine without it can tell: operators, refusals, memory given back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[torch]'")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from backends import torch_eager  # noqa: E402
from backends.api import Unavailable, Unsupported  # noqa: E402
from backends.shared import torch_devices  # noqa: E402
from backends.torch_eager import linear, mps  # noqa: E402
from reference.config import Config  # noqa: E402
from reference.synthetic import synthetic  # noqa: E402

CONFIG = Config(n_layer=2, n_embd=64, n_ffn=256, n_vocab=100)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operator.name())
        return operator(*args, **(kwargs or {}))


def recorded(scheme: str, change: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What a session dispatches over its whole contract, products as on a GPU, composites taken apart."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # in which composites are not taken apart
    monkeypatch.setattr(linear, "onednn_packs", lambda dtype: False)
    with Recorder() as recorder:
        model = synthetic(CONFIG, 0)
        load = torch_eager.load(model, scheme, "cpu", 1) if change is None else None
        session: Any = load or torch_eager.adjust(model, scheme, "cpu", 1, change or {})
        _, state = session.forward([1, 2, 3], None)
        session.forward([4], state)
        session.logits([1, 2], state)
        session.trace([1, 2], None, lambda name, value: None)
        session.greedy(1, state, 3)
        session.forward([1], session.import_state(session.export_state(state)))
    return set(recorder.names)


def published() -> dict[str, dict[str, Any]]:
    """Operator -> its entry in the native_functions.yaml of the installed torch."""
    yaml = pytest.importorskip("yaml", reason="torchgen's list is YAML and PyYAML is not installed")
    found = importlib.util.find_spec("torchgen")
    if found is None or found.origin is None:
        pytest.skip("this torch brings no torchgen")
    text = (Path(found.origin).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    return {f"aten::{entry['func'].partition('(')[0]}": entry for entry in yaml.safe_load(text)}


def on_mps(name: str, entries: dict[str, dict[str, Any]]) -> bool:
    """Whether the list gives an operator a kernel on MPS, or makes it of others."""
    entry = entries[name]
    keys = {key.strip() for group in entry.get("dispatch", {}) for key in group.split(",")}
    delegate = entry.get("structured_delegate")
    if delegate is not None and on_mps(f"aten::{delegate}", entries):
        return True
    composite = not entry.get("dispatch") and delegate is None  # no entry means CompositeImplicitAutograd
    return composite or not keys.isdisjoint(mps.KEYS)


@pytest.mark.parametrize("change", [None, {"fp32": ["*.ffn.k2"], "rescale_every": 1}], ids=["plain", "adjusted"])
@pytest.mark.parametrize("scheme", ["fp32", "fp16", "bf16"])
def test_the_list_of_operators_is_complete(
    scheme: str, change: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recorded(scheme, change, monkeypatch) - set(mps.OPERATORS) == set()


def test_torch_publishes_every_operator_for_mps() -> None:
    entries = published()
    assert [name for name in mps.OPERATORS if not on_mps(name, entries)] == []
    # The check can fail: operators that the same list has for other devices only.
    assert not on_mps("aten::_linalg_eigh", entries)
    assert not on_mps("aten::mkldnn_linear", entries)


def test_an_operator_that_mps_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine no operator has an MPS kernel, unless it is made of others."""
    if not torch.backends.mps.is_built():
        assert "aten::mm" in mps.lacking()
        assert "aten::zeros" not in mps.lacking()
        entries = published()
        of_others = {name for name in mps.OPERATORS if "Composite" in str(entries[name].get("dispatch"))}
        assert {"aten::stack", "aten::expand"} <= of_others
        assert not of_others & set(mps.lacking())
    monkeypatch.setattr(mps, "lacking", lambda: ["aten::lerp.Tensor"])
    with pytest.raises(Unsupported, match=r"lacks aten::lerp\.Tensor on MPS, and nothing may run on the CPU instead"):
        mps.check_operators("fp16")


def test_bf16_needs_macos_14(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "lacking", list)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    mps.check_operators("fp16")
    with pytest.raises(Unsupported, match="bf16 on MPS needs macOS 14"):
        mps.check_operators("bf16")


def test_a_fall_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv(torch_devices.MPS_FALLBACK, "1")
    with pytest.raises(Unsupported, match=r"PYTORCH_ENABLE_MPS_FALLBACK is set, .* unset it"):
        torch_eager.load(synthetic(CONFIG, 0), "fp32", "mps", 1)
    monkeypatch.setenv(torch_devices.MPS_FALLBACK, "0")
    torch_devices.check_mps()


class Fake:
    """A module of torch's that counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.asked.append(name)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_memory_is_given_back_at_the_end_and_where_loading_runs_out_of_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, device = Fake(), type("Device", (), {"type": kind, "__str__": lambda self: kind})()
    monkeypatch.setattr(torch, kind, fake)
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: fake.asked.append(clear), raising=False)
    torch_devices.give_back(device)
    assert fake.asked == ["synchronize", *[clear] * (kind == "cuda"), "empty_cache"]
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("MPS backend out of memory (M")):
        fake.asked.clear()
        said = f"torch ran out of memory of {kind} while loading: .*; try a smaller"
        with pytest.raises(Unavailable, match=said), torch_devices.loading(device, "torch"):
            raise error
        assert fake.asked[-1] == "empty_cache"
    with pytest.raises(RuntimeError, match="illegal memory access"), torch_devices.loading(device, "torch"):
        raise RuntimeError("an illegal memory access")


@pytest.mark.parametrize(
    ("driver", "built_for", "said"),
    [
        (11040, "12.8", "the NVIDIA driver is too old: it has CUDA 11.4, torch was built for 12.8; install a newer"),
        (12080, "13.0", "too old: it has CUDA 12.8, torch was built for 13.0"),
        (12020, "12.8", None),
        (None, "12.8", None),
        (11040, None, None),
    ],
)
def test_a_driver_that_is_too_old(driver: int | None, built_for: str | None, said: str | None) -> None:
    if said is None:
        torch_devices.check_driver(driver, built_for)
        return
    with pytest.raises(Unavailable, match=said):
        torch_devices.check_driver(driver, built_for)


def test_why_no_cuda_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch_devices, "driver_version", lambda: 11040)
    with pytest.raises(Unavailable, match="the NVIDIA driver is too old"):
        torch_devices.open_device("cuda", "torch")
    monkeypatch.setattr(torch_devices, "driver_version", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(Unavailable, match=r"sees no CUDA device; .*CUDA_VISIBLE_DEVICES is ''"):
        torch_devices.open_device("cuda", "torch")
