"""The tables of docs/verdicts.md: error rates of the verdict, and what other rules see at the same false-alarm rate.

python scripts/verdict_rates.py                     error rates on the recorded traces
python scripts/verdict_rates.py --rivals            power at a matched false-alarm rate
python scripts/verdict_rates.py --rivals --reports 500   quicker, coarser
"""

from __future__ import annotations

import argparse

from reports.tables import Table, markdown
from reports.verdict.decision import Rules
from reports.verdict.error_rates import CELLS
from reports.verdict.resample import APART, PAIRS, recorded
from reports.verdict.rivals import OURS, RIVALS, matched
from reports.verdict.selftest import SPREADS, formatted, measured

#: Blocks per arm, or pairs, at which every rule is compared: about what is asked for.
BLOCKS = {APART: {0.005: (10,), 0.02: (24,), 0.05: (100,)}, PAIRS: {0.005: (15,), 0.02: (18,), 0.05: (48,)}}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--reports", type=int, default=2000)
    arguments = parser.parse_args()
    if arguments.rivals:
        print(markdown(rivals(arguments.reports)))
        return
    for record in recorded():
        found = measured(record, Rules(), arguments.reports, SPREADS)
        print(formatted(record, found, Rules(), "md", None, False), flush=True)


def rivals(reports: int) -> Table:
    """A line per record, drawing, spread and number of blocks."""
    names = (OURS, *RIVALS)
    lines, totals = [], dict.fromkeys(names, 0.0)
    for record in recorded():
        for how, spreads in BLOCKS.items():
            for spread, sizes in spreads.items():
                for blocks in sizes:
                    seen = matched(record, how, spread, blocks, 0.05, CELLS, 0, reports)
                    found = [100 * seen.power[name] for name in names]
                    totals = {name: totals[name] + seen.power[name] for name in names}
                    what = (record.name, how, f"{100 * spread:g} %", str(blocks))
                    lines.append((*what, *(f"{it:.1f}" for it in found)))
    count = max(1, len(lines))
    lines.append(("all", "", "", "", *(f"{100 * totals[name] / count:.1f}" for name in names)))
    header = ("record", "drawn", "CV", "blocks", *names)
    note = f"percent of slowdowns of 5 % found where 1 % of {reports} reports of {CELLS} cells raise a false alarm"
    return Table("power at a matched false-alarm rate", header, tuple(lines), (note,))


if __name__ == "__main__":
    main()
