"""The tables of docs/verdicts.md: error rates of the verdict, and what other rules see at the same false-alarm rate.

python scripts/verdict_rates.py                     error rates on the recorded traces
python scripts/verdict_rates.py --rivals            power at a matched false-alarm rate
python scripts/verdict_rates.py --rivals --effect 0.03   of a smaller slowdown, where they differ more
python scripts/verdict_rates.py --lags              for how long blocks are alike
"""

from __future__ import annotations

import argparse
import math
from statistics import NormalDist

import numpy as np

from reports.tables import Table, markdown
from reports.verdict.decision import Rules
from reports.verdict.dependence import likeness
from reports.verdict.error_rates import CELLS
from reports.verdict.permutation import Arms, slower
from reports.verdict.resample import A_ROW, APART, PAIRS, SLOW, draw, recorded
from reports.verdict.rivals import OURS, RATE, RIVALS, matched
from reports.verdict.selftest import SPREADS, formatted, measured

#: Spreads of a report's cells and blocks per arm, or pairs: what is asked for where all are alike, and quiet and noisy
#: cells in one report.
DESIGNS = {
    APART: (((0.005,), 10), ((0.02,), 24), ((0.05,), 100), (SPREADS, 40)),
    PAIRS: (((0.005,), 15), ((0.02,), 18), ((0.05,), 48), (SPREADS, 24)),
}


#: Seconds between two blocks, and what part of a record may lie between them.
LAGS = (0.5, 4, 12, 20, 40, 60, 120, 180, 240, 300)
MOST_LAG = 1 / 3


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--nominal", action="store_true")
    parser.add_argument("--lags", action="store_true")
    parser.add_argument("--effect", type=float, default=0.05, help="slowdown that is looked for (default 0.05)")
    parser.add_argument("--reports", type=int, default=2000)
    arguments = parser.parse_args()
    if arguments.lags:
        print(markdown(lags()))
        return
    if arguments.nominal:
        print(markdown(nominal(arguments.reports)))
        return
    if arguments.rivals:
        print(markdown(rivals(arguments.reports, arguments.effect)))
        return
    for record in recorded():
        found = measured(record, Rules(), arguments.reports, SPREADS)
        print(formatted(record, found, Rules(), "md", None, False), flush=True)


def rivals(reports: int, effect: float) -> Table:
    """A line per record, drawing, spread and number of blocks."""
    names = (OURS, *RIVALS)
    lines, totals = [], dict.fromkeys(names, 0.0)
    for record in recorded():
        for how, designs in DESIGNS.items():
            for spreads, blocks in designs:
                seen = matched(record, how, spreads, blocks, effect, CELLS - CELLS % len(spreads), 0, reports)
                for spread, power in seen.power.items():
                    totals = {name: totals[name] + power[name] for name in names}
                    mixed = " of all" if len(spreads) > 1 else ""
                    what = (record.name, how, f"{100 * spread:g} %{mixed}", str(blocks))
                    lines.append((*what, *(f"{100 * power[name]:.1f}" for name in names)))
    count = max(1, len(lines))
    lines.append(("all", "", "", "", *(f"{100 * totals[name] / count:.1f}" for name in names)))
    header = ("record", "drawn", "CV", "blocks", *names)
    rate = f"1 % of {reports} reports of {CELLS} cells raise a false alarm"
    note = f"percent of slowdowns of {100 * effect:g} % found where {rate}"
    return Table("power at a matched false-alarm rate", header, tuple(lines), (note,))


def lags() -> Table:
    """How alike blocks of each record are, by the seconds between them."""
    lines = []
    for record in (*recorded(), *recorded(SLOW)):
        values = record.logs.mean(axis=1)
        length = record.step * len(values)
        found = [
            f"{likeness(values, round(lag / record.step)):.2f}" if 0.75 * record.step < lag < MOST_LAG * length else "-"
            for lag in LAGS
        ]
        lines.append((f"{record.name}, every {record.step:.2g} s for {length:.0f} s", *found))
    header = ("record", *(f"{lag:g} s" for lag in LAGS))
    return Table("rank correlation of blocks so far apart", header, tuple(lines), ())


def nominal(reports: int, blocks: int = 24) -> Table:
    """Reports with a false alarm where the others' tests have 1 % over all cells, as they count it (Bonferroni)."""
    limit = NormalDist().inv_cdf(1 - RATE / CELLS)
    lines = []
    for record in recorded():
        base, head = draw(record.scaled(0.02), APART, reports, CELLS, blocks, np.random.default_rng(0))
        k = blocks * record.logs.shape[1]
        ranks = RIVALS["Mann-Whitney"](base, head)
        found = ((ranks - k * (2 * k + 1) / 2) / math.sqrt(k * k * (2 * k + 1) / 12), RIVALS["Welch's t"](base, head))
        alarms = [f"{100 * float((z > limit).any(axis=1).mean()):.0f} %" for z in found]
        own = Arms(
            *(
                side.mean(axis=-1)
                for side in draw(record.scaled(0.02), A_ROW, reports, CELLS, blocks, np.random.default_rng(1))
            )
        )
        alarms.append(f"{100 * float((slower(own, 0.0) <= RATE / CELLS).any(axis=1).mean()):.0f} %")
        lines.append((record.name, *alarms))
    header = ("record", "Mann-Whitney of samples", "Welch's t of samples", "blocks in a row taken for independent")
    note = f"A/A reports of {CELLS} cells, {blocks} blocks per arm, with an alarm; 1 % is meant"
    return Table("false alarms of tests that do not know of blocks", header, tuple(lines), (note,))


if __name__ == "__main__":
    main()
