"""What ``rwkv-bench list`` tells: backends, schemes, hardware, models; no runtime is imported."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from backends.api import BackendInfo, Unavailable
from backends.index import backend_names, load_backend
from harness.hardware import KNOWN, Hardware, default_threads, describe, local_hardware
from harness.machine.known import profiles
from harness.machine.probe import ProbeFailed, cpu_rates, known_cpu_rates
from harness.models import TINY, model_config, model_names
from harness.session import check_usable
from reference.config import count_parameters
from reference.errors import InputError
from reference.schemes import SCHEMES, Scheme

Records = list[dict[str, Any]]

#: Of a scheme without a codec, instead of what it leaves unquantized.
_NO_CODEC = "unknown: no kernel parity"


def collect(what: str | None) -> dict[str, Records]:
    """The sections asked for (``None``: all), each a list of flat records."""
    sections = {"backends": _backends, "schemes": _schemes, "hardware": _hardware, "models": _models}
    return {name: make() for name, make in sections.items() if what in (None, name)}


def _backends() -> Records:
    records: Records = []
    for name in backend_names():
        try:
            info = load_backend(name).INFO
        except InputError as error:
            records.append({"name": name, "status": str(error), "devices": [], "schemes": [], "description": None})
            continue
        records.append(
            {
                "name": name,
                "status": _status(name),
                "devices": list(info.devices),
                "schemes": list(info.schemes),
                "description": info.description,
            }
        )
    return records


def _status(name: str) -> str:
    """``ready``, or why not and how to get it."""
    try:
        check_usable(name, load_backend(name))
    except Unavailable as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - somebody else's check may raise anything; the list goes on
        return f"broken: check() raised {type(error).__name__}: {error}"
    return "ready"


def _schemes() -> Records:
    infos: dict[str, BackendInfo] = {}
    for name in backend_names():
        with suppress(InputError):  # `list backends` tells
            infos[name] = load_backend(name).INFO
    known = [_scheme(scheme) for scheme in SCHEMES.values()]
    known += [
        _foreign(name) for name in dict.fromkeys(n for i in infos.values() for n in i.schemes) if name not in SCHEMES
    ]
    for record in known:
        record["backends"] = [name for name, info in infos.items() if record["name"] in info.schemes]
    return known


def _scheme(scheme: Scheme) -> dict[str, Any]:
    """``bits`` are those of a weight in the layers' matrices, all told, at the 169M shape."""
    return {
        "name": scheme.name,
        "class": scheme.scheme_class,
        "bits": None if scheme.bits is None else round(scheme.bits, 2),
        "group": scheme.group,
        "scales": scheme.scales or None,
        "unquantized": _NO_CODEC if scheme.unquantized is None else list(scheme.unquantized),
        "system": scheme.system,
    }


def _foreign(name: str) -> dict[str, Any]:
    """A scheme that only a backend knows."""
    unknown = dict.fromkeys(("class", "bits", "group", "scales"))
    return {"name": name, **unknown, "unquantized": _NO_CODEC, "system": None}


def _hardware() -> Records:
    """What is here with all that it tells; what is known but not here with what its data sheet says."""
    here = local_hardware()
    found = [_here(place) for place in here]
    names = {item.name for item in here}
    return found + [_known(name) for name in KNOWN if name not in names]


def _here(place: Hardware) -> dict[str, Any]:
    told = {key: value for key, value in describe(place).items() if key not in ("name", "python")}
    rates = known_cpu_rates(default_threads(1 << 40)) if place.device == "cpu" else None
    return {
        "name": place.name,
        "device": place.device,
        "here": True,
        "detail": place.detail,
        "memory": _size(told.get("device_memory_bytes", told.get("memory_bytes"))),
        "bandwidth": None if rates is None else f"{rates['read_bytes_per_s'] / 1e9:.3g} GB/s measured",
        "matrix rate": None if rates is None else _rates(rates["flops"]) + " measured",
        "facts": [f"{key}={value}" for key, value in told.items()],
    }


def _known(name: str) -> dict[str, Any]:
    profile = profiles()[name]
    flops = {kind: figure.value for kind, figure in profile.flops.items() if figure is not None}
    bandwidth, memory = profile.read_bytes_per_s, profile.memory_bytes
    return {
        "name": name,
        "device": None,
        "here": False,
        "detail": f"not in this machine; {profile.name}, {profile.note}",
        "memory": None if memory is None else _size(int(memory.value)),
        "bandwidth": None if bandwidth is None else f"{bandwidth.value / 1e9:.4g} GB/s",
        "matrix rate": _rates(flops),
        "facts": None if bandwidth is None else [f"source={bandwidth.source.title} ({bandwidth.source.by})"],
    }


def _rates(flops: Mapping[str, float]) -> str:
    """``fp32 19.5, fp16 312 TFLOP/s``."""
    told = {kind: rate / 1e12 for kind, rate in flops.items()}
    shown = (f"{kind} {rate:.0f}" if rate >= 100 else f"{kind} {rate:.3g}" for kind, rate in told.items())
    return ", ".join(shown) + " TFLOP/s"


def measure_again() -> None:
    """Measure what :func:`_here` shows of this machine's processor anew. Raises Unavailable where that fails."""
    try:
        cpu_rates(default_threads(1 << 40), again=True)
    except ProbeFailed as error:
        raise Unavailable(str(error)) from None


def _size(value: Any) -> str | None:
    return None if value is None else f"{int(value) / 1e9:.3g} GB"


def _models() -> Records:
    records = []
    for name in model_names():
        config = model_config(name)
        records.append(
            {
                "name": name,
                "layers": config.n_layer,
                "width": config.n_embd,
                "vocabulary": config.n_vocab,
                "parameters": count_parameters(config),
                "description": "embedded, trained by this project" if name == TINY else "real shape, synthetic weights",
            }
        )
    return [*records, {"name": "PATH", "description": "a .pth or .safetensors file, or a Hugging Face RWKV folder"}]
