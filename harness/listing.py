"""What ``rwkv-bench list`` tells: backends, schemes, hardware, models; no runtime is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from backends.api import BackendInfo, Unavailable
from backends.index import backend_names, load_backend
from harness.hardware import KNOWN, local_hardware
from harness.models import TINY, model_config, model_names
from harness.session import check
from reference.config import count_parameters
from reference.schemes import SCHEMES

Listing = dict[str, list[dict[str, Any]]]


def collect(what: str | None) -> Listing:
    """The sections asked for (``None``: all), each a list of flat records."""
    sections = {"backends": _backends, "schemes": _schemes, "hardware": _hardware, "models": _models}
    return {name: make() for name, make in sections.items() if what in (None, name)}


def as_json(found: Listing) -> str:
    """One JSON document."""
    return json.dumps({"schema": 1, **found}, indent=1) + "\n"


def as_text(found: Listing) -> str:
    """Aligned columns, a blank line between sections."""
    return "\n".join(_section(name, records) for name, records in found.items())


def _backends() -> list[dict[str, Any]]:
    records = []
    for name in backend_names():
        module = load_backend(name)
        info: BackendInfo = module.INFO
        status = "ready"
        try:
            check(module)
        except Unavailable as error:
            status = str(error)
        records.append(
            {
                "name": name,
                "status": status,
                "devices": list(info.devices),
                "schemes": list(info.schemes),
                "description": info.description,
            }
        )
    return records


def _schemes() -> list[dict[str, Any]]:
    infos = [(name, load_backend(name).INFO) for name in backend_names()]
    return [
        {
            "name": scheme.name,
            "class": scheme.scheme_class,
            "bits": scheme.bits,
            "backends": [name for name, info in infos if scheme.name in info.schemes],
            "description": scheme.description,
        }
        for scheme in SCHEMES.values()
    ]


def _hardware() -> list[dict[str, Any]]:
    here = local_hardware()
    records: list[dict[str, Any]] = [
        {"name": h.name, "device": h.device, "here": True, "detail": h.detail} for h in here
    ]
    names = {item.name for item in here}
    return records + [
        {"name": name, "device": None, "here": False, "detail": "not in this machine"}
        for name in KNOWN
        if name not in names
    ]


def _models() -> list[dict[str, Any]]:
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


def _section(name: str, records: list[dict[str, Any]]) -> str:
    keys = list(records[0])
    lines = [[_text(record.get(key)) for key in keys] for record in records]
    widths = [max(len(line[i]) for line in [keys, *lines]) for i in range(len(keys))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    head = "  ".join(key.ljust(width) for key, width in zip(keys, widths, strict=True)).rstrip()
    return "\n".join([f"{name}:", f"  {head}", *(f"  {row}" for row in rows)]) + "\n"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1_000_000:
        return f"{value / 1e9:.1f} B" if value >= 1e9 else f"{value / 1e6:.0f} M"
    if isinstance(value, str) or not isinstance(value, Iterable):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return ", ".join(str(item) for item in value)
