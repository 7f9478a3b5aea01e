"""What ``rwkv-bench list`` tells: backends, schemes, hardware, models; no runtime is imported."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from backends.api import BackendInfo, Unavailable
from backends.index import backend_names, load_backend
from harness.hardware import KNOWN, local_hardware
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
    here = local_hardware()
    records: Records = [{"name": h.name, "device": h.device, "here": True, "detail": h.detail} for h in here]
    names = {item.name for item in here}
    return records + [
        {"name": name, "device": None, "here": False, "detail": "not in this machine"}
        for name in KNOWN
        if name not in names
    ]


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
