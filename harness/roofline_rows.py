"""The roofline fraction of measured rows, against rates measured where the backend runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from backends.api import Unavailable, Unsupported
from harness.hardware import Hardware, describe
from harness.isolation.child import ChildDied, ChildTimedOut
from harness.isolation.remote import RemoteError, RemoteSession
from harness.machine.facts import facts
from harness.machine.probe import Measured, ProbeFailed, cpu_rates, kept, of_this_run
from harness.machine.work import measure_device
from harness.roofline import FITS, Rates, decode_fraction, matrix_rate, prefill_fraction
from harness.rows import Row
from harness.session import Opened
from reference.config import Config

#: Type of the activations, as an arithmetic declares it -> the matrix rate that a prefill is held against.
#: Blocks of 4 bits are unpacked to bytes before they are multiplied.
_FACTORS = {
    **{kind: kind for kind in ("fp32", "fp16", "bf16")},
    **dict.fromkeys(("fp16in", "fp16rows"), "fp16"),
    **dict.fromkeys(("int4x32", "uint4x32"), "int8"),
}

Tell = Callable[[str], None]


class Roofline:
    """Rates of one cell's place, probed when a row first needs them."""

    def __init__(self, hardware: Hardware, threads: int, config: Config, opened: Opened, tell: Tell) -> None:
        self._hardware, self._threads, self._config = hardware, threads, config
        self._opened, self._tell = opened, tell
        self._found: Rates | str | None = None
        self._anew = False

    def of(self, row: Row) -> Row:
        """The row with its fraction and, under ``roofline``, what it is a fraction of; or why it has none."""
        if row.metric not in ("prefill", "decode") or row.value is None or row.workload is None:
            return row
        told = self._fraction(row)
        if not self._anew and told.get("fraction", 0.0) > 1:  # the rate was taken while something disturbed it
            self._anew, self._found = True, None
            told = self._fraction(row)
        return replace(row, roofline_fraction=told.pop("fraction", None), extra={**row.extra, "roofline": told})

    def _fraction(self, row: Row) -> dict[str, Any]:
        if self._cached(row):
            return {"reason": f"the weights fit {FITS} times into the last-level cache"}
        if row.weight_bytes is None:
            return {"reason": f"how many bytes {row.scheme} stores is not known here"}
        rates = self._rates()
        if isinstance(rates, str):
            return {"reason": rates}
        assert row.value is not None
        assert row.workload is not None
        if row.metric == "decode":
            fraction = decode_fraction(row.value, row.weight_bytes, rates, row.workload.batch)
            return _told(fraction, "read bandwidth", rates.read_bytes_per_s, "byte/s")
        factors = _factors(self._opened.arithmetic.activations)
        prompt = row.workload.prompt_tokens
        fraction = prefill_fraction(row.value, self._config, prompt, factors, rates, row.weight_bytes)
        used, rate = matrix_rate(factors, rates) or (factors, None)
        return _told(fraction, f"{used} matrix rate", rate, "FLOP/s")

    def _cached(self, row: Row) -> bool:
        """Whether the processor's cache alone decides, so that nothing needs to be probed."""
        if self._hardware.device != "cpu" or row.weight_bytes is None:
            return False
        told = self._hardware.facts.get("l3_bytes", self._hardware.facts.get("l2_bytes"))
        here = facts().cpu.last_level_bytes if self._hardware.host is None else told
        return here is not None and FITS * row.weight_bytes <= int(here)

    def _rates(self) -> Rates | str:
        if self._found is None:
            self._tell("measuring read bandwidth and matrix rate")
            try:
                taken = self._probed()
                self._found = Rates(taken["read_bytes_per_s"], taken["flops"], taken["last_level_bytes"])
            except (ProbeFailed, ImportError, RemoteError, Unavailable, Unsupported, RuntimeError) as error:
                self._found = f"no rate was measured: {error}"
            except (ChildDied, ChildTimedOut) as error:
                self._found = f"no rate was measured: the process ended: {error}"
        return self._found

    def _probed(self) -> Measured:
        place, session = self._hardware, self._opened.session
        if place.host is None and place.device == "cpu":
            return cpu_rates(self._threads, self._opened.cpus, higher=self._anew)
        keep, detail = (kept if place.device == "cpu" else of_this_run), describe(place)
        key = {
            "host": place.host,
            "device": place.device,
            "name": place.detail,
            **{name: detail.get(name) for name in ("driver", "power_limit_w", "max_mhz")},
            "threads": self._threads,
            "backend": self._opened.info.name,
            "version": self._opened.version,
        }
        if isinstance(session, RemoteSession):
            line, threads = session.line, self._threads
            return keep(key, lambda: line.ask("rates", device=place.device, threads=threads)[0], higher=self._anew)
        return keep(key, partial(measure_device, place.device), higher=self._anew)


def _factors(activations: str) -> str:
    """The type that matrix units are fed with; quantized activations of any group are int8."""
    return "int8" if activations.startswith("int8") else _FACTORS[activations]


def _told(fraction: float | None, of: str, rate: float | None, unit: str) -> dict[str, Any]:
    if fraction is None:
        return {"reason": f"no {of} was measured"}
    return {"fraction": fraction, "of": of, "rate": rate, "unit": unit}
