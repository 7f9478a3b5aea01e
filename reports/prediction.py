"""What a piece of hardware that is not here should give: a fraction of its roofline that others have reached.

The fraction is not known, so the row has a range: the least and the most of published and recorded figures of the same
scheme, else of its kin, and their median as the value. All of them are named in the row. A prediction is never a
measurement and has no verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from harness.machine.known import Profile, profiles
from harness.roofline import decode_fraction, prefill_flops, weight_bytes
from harness.rows import Row
from reference.config import Config
from reference.schemes import SCHEMES
from reports.peak import config_of, matrix_peak, peak_rates, with_peak_fraction
from reports.published import claims

#: Prompt tokens of a predicted prefill, where the head's single product no longer counts.
_PROMPT = 256


def predicted_rows(hardware: str, models: Sequence[str], schemes: Iterable[str], recorded: Sequence[Row]) -> list[Row]:
    """Prefill and decode of every model and scheme on a hardware whose profile is known.

    models    presets; others have no shape and no row
    schemes   names or classes; ``all`` and the default model stand for what is published of that hardware
    recorded  recorded rows of any hardware, whose fractions count too
    """
    profile = profiles().get(hardware)
    if profile is None or profile.read_bytes_per_s is None:
        return []
    known = [claim.row(url, title) for claim, url, title in claims()]
    known += [with_peak_fraction(row) for row in recorded]
    rows = []
    for model, scheme in _cells(hardware, models, tuple(schemes), known):
        config = config_of(model)
        if config is None or scheme not in SCHEMES:
            continue
        found = (_decode(profile, model, config, scheme, known), _prefill(profile, model, config, scheme, known))
        rows += [row for row in found if row is not None]
    return rows


def _cells(hardware: str, models: Sequence[str], schemes: Sequence[str], known: Sequence[Row]) -> list[tuple[str, str]]:
    """Model and scheme of each prediction."""
    own = [row for row in known if row.hardware == hardware]
    named = [model for model in models if config_of(model) is not None]
    named = named or list(dict.fromkeys(row.model for row in own if config_of(row.model))) or ["7b"]
    wanted: list[str] = []
    for name in schemes:
        if name in SCHEMES:
            wanted.append(name)
        else:
            published = [row.scheme for row in own if name in ("all", row.scheme_class)]
            wanted += published or [s for s in ("q0f16", "q4f16_1") if name in ("all", SCHEMES[s].scheme_class)]
    return [(model, scheme) for model in named for scheme in dict.fromkeys(wanted)]


def _decode(profile: Profile, model: str, config: Config, scheme: str, known: Sequence[Row]) -> Row | None:
    rates, step = peak_rates(profile), weight_bytes(config, scheme)
    one = decode_fraction(1.0, step, rates)
    return None if one is None else _row(profile, model, scheme, "decode", 1 / one, step, known)


def _prefill(profile: Profile, model: str, config: Config, scheme: str, known: Sequence[Row]) -> Row | None:
    rate = matrix_peak(profile, scheme)
    if rate is None:
        return None
    most = rate * _PROMPT / prefill_flops(config, _PROMPT)
    return _row(profile, model, scheme, "prefill", most, weight_bytes(config, scheme), known)


def _alike(scheme: str, rows: Sequence[Row]) -> tuple[str, list[Row]]:
    """Of the rows those whose scheme is nearest: the same, its system's of its class, its class's, any; and which."""
    own = SCHEMES[scheme]

    def kin(row: Row) -> bool:
        return row.scheme in SCHEMES and SCHEMES[row.scheme].system == own.system

    tries = (
        (scheme, [row for row in rows if row.scheme == scheme]),
        (
            f"{own.system}'s {own.scheme_class} schemes",
            [r for r in rows if kin(r) and r.scheme_class == own.scheme_class],
        ),
        (f"{own.scheme_class} schemes", [row for row in rows if row.scheme_class == own.scheme_class]),
        (f"any scheme, as none of class {own.scheme_class} is", list(rows)),
    )
    return next((found for found in tries if found[1]), tries[-1])


def _row(
    profile: Profile, model: str, scheme: str, metric: str, most: float, step: int | None, known: Sequence[Row]
) -> Row | None:
    """The prediction of a figure that would be ``most`` at the roofline itself."""
    kinds, basis = _alike(scheme, [r for r in known if r.metric == metric and r.roofline_fraction is not None])
    if not basis:
        return None
    # One figure a cell: thread counts of one cell are not independent evidence, its best one is what it can do.
    best: dict[tuple[str, str, str, str], float] = {}
    for row in basis:
        key = (row.hardware, row.backend, row.model, row.scheme)
        best[key] = max(best.get(key, 0.0), row.roofline_fraction or 0.0)
    fractions = sorted(best.values())
    middle, low, high = statistics.median(fractions), fractions[0], fractions[-1]
    what = "peak bandwidth" if metric == "decode" else "peak matrix rate"
    reason = (
        f"{100 * middle:.2g} % of {what}; {100 * low:.2g} to {100 * high:.2g} % are published or recorded for {kinds} "
        f"({len(fractions)} {'cell' if len(fractions) == 1 else 'cells'})"
    )
    if profile.memory_bytes is not None and step is not None and step > profile.memory_bytes.value:
        reason += "; the weights do not fit into its memory"
    figure = profile.read_bytes_per_s if metric == "decode" else profile.flops["fp16"] or profile.flops["fp32"]
    return Row(
        kind="predicted",
        hardware=profile.short,
        backend="any",
        model=model,
        scheme=scheme,
        scheme_class=SCHEMES[scheme].scheme_class,
        metric=metric,
        value=middle * most,
        weight_bytes=step,
        roofline_fraction=middle,
        reason=reason,
        extra={
            "range": [low * most, high * most],
            "source": None if figure is None else str(figure.source),
            "basis": [{"cell": list(cell), "fraction": fraction} for cell, fraction in best.items()],
        },
    )
