"""Numbers as people read them: no more digits than they carry."""

from __future__ import annotations


def small(value: float) -> str:
    """``2.1e-6``: an exponent without its leading zero."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def number(value: float | None) -> str:
    """Three significant digits, whole numbers whole up to 10,000 and of four digits beyond."""
    if value is None:
        return ""
    if value >= 1e4:
        return f"{float(f'{value:.4g}'):.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(value: float) -> str:
    """``28.1 ms``, ``1.52 s``."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
