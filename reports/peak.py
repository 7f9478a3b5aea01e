"""What part of the published peak of its hardware a figure is: comparable across machines that nobody here has."""

from __future__ import annotations

from dataclasses import replace

from harness.machine.known import Profile, profiles
from harness.roofline import Rates, decode_fraction, prefill_flops, weight_bytes
from harness.rows import Row
from reference.config import Config, preset, preset_names
from reference.schemes import SCHEMES

#: A prompt so long that the head's single product does not count, for figures that state no length.
_LONG = 1 << 20


def with_peak_fraction(row: Row) -> Row:
    """The row with its bytes per step and its fraction of the peak; as it is where a part of that is unknown."""
    config, profile = config_of(row.model), profiles().get(row.hardware)
    if config is None or profile is None or row.value is None or row.metric not in ("prefill", "decode"):
        return row
    step = weight_bytes(config, row.scheme)
    rates = peak_rates(profile)
    if row.metric == "decode":
        fraction = decode_fraction(row.value, step, rates)
    else:
        prompt = row.workload.prompt_tokens if row.workload else _LONG
        rate = matrix_peak(profile, row.scheme)
        fraction = None if rate is None else row.value / prompt * prefill_flops(config, prompt) / rate
    return replace(row, weight_bytes=row.weight_bytes or step, roofline_fraction=fraction)


def config_of(model: str) -> Config | None:
    """Shape of a released size; ``None`` for any other name."""
    return preset(model) if model in preset_names() else None


def peak_rates(profile: Profile) -> Rates:
    """A profile's figures, without their sources."""
    bandwidth = profile.read_bytes_per_s
    flops = {kind: figure.value for kind, figure in profile.flops.items() if figure is not None}
    return Rates(None if bandwidth is None else bandwidth.value, flops, source="data sheet")


def matrix_peak(profile: Profile, scheme: str) -> float | None:
    """Peak of the type that a scheme's products are computed in: float32 or half; the latter is no less."""
    flops = peak_rates(profile).flops
    full, half = flops.get("fp32"), flops.get("fp16")
    known = SCHEMES.get(scheme)
    if known is not None and known.scheme_class == "f32":
        return full
    return max((rate for rate in (full, half) if rate is not None), default=None)
