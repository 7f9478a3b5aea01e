"""The tables of docs/verdicts.md: error rates of the verdict, and what other rules see at the same false-alarm rate.

python scripts/verdict_rates.py                     error rates on the recorded traces
python scripts/verdict_rates.py --rivals            power at a matched false-alarm rate
python scripts/verdict_rates.py --rivals --effect 0.03   of a smaller slowdown, where they differ more
"""

from __future__ import annotations

import argparse

from reports.tables import Table, markdown
from reports.verdict.decision import Rules
from reports.verdict.error_rates import CELLS
from reports.verdict.resample import APART, PAIRS, recorded
from reports.verdict.rivals import OURS, RIVALS, matched
from reports.verdict.selftest import SPREADS, formatted, measured

#: Spreads of a report's cells and blocks per arm, or pairs: what is asked for where all are alike, and quiet and noisy
#: cells in one report.
DESIGNS = {
    APART: (((0.005,), 10), ((0.02,), 24), ((0.05,), 100), (SPREADS, 40)),
    PAIRS: (((0.005,), 15), ((0.02,), 18), ((0.05,), 48), (SPREADS, 24)),
}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--effect", type=float, default=0.05, help="slowdown that is looked for (default 0.05)")
    parser.add_argument("--reports", type=int, default=2000)
    arguments = parser.parse_args()
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


if __name__ == "__main__":
    main()
