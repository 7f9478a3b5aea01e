"""Figures of the judge: ``python -m suites.selftest.planted``; exit 1 where a bar is missed or nothing was run.

python -m suites.selftest.planted --full --jobs 2      what docs/detection.md keeps
python -m suites.selftest.planted --full --keep FILE   the same, in pieces: interrupt it and start it again
python -m suites.selftest.planted                      a sample, in a minute or two
python -m suites.selftest.planted --only "decay sign" --arithmetic fp32 --models tiny
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from threadpoolctl import threadpool_limits

from suites.selftest.planted import kept
from suites.selftest.planted.backend import LOGITS, STATE, TRACE
from suites.selftest.planted.catalogue import FAULTS, GROUPS, names_of
from suites.selftest.planted.clean import Clean, clean_runs, false_alarm
from suites.selftest.planted.figures import figures
from suites.selftest.planted.report import clean_text, faults_text
from suites.selftest.planted.subject import KINDS
from suites.selftest.planted.trial import Outcome, Trial, attempt, trials

#: Trials and clean runs of a sample, and clean runs of all.
SAMPLE, CLEAN_SAMPLE, CLEAN = 60, 60, 1000

#: Random models; every third one has large keys.
RANDOM = ("1", "2", "3")

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and say whether every bar was reached."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.as_is and (options.keep is None or not options.keep.is_file()):
        parser.error(f"--as-is needs --keep with a file that exists, not {options.keep}")
    unknown = set(options.of.split(",")) - {"", *GROUPS}
    if unknown:
        parser.error(f"--of: no kind {', '.join(sorted(unknown))}; choose from {', '.join(GROUPS)}")
    models = [m for name in options.models.split(",") for m in (RANDOM if name == "random" else (name,))]
    planned = trials(models, options.arithmetic.split(","), options.seed)
    if options.only:
        planned = [trial for trial in planned if trial.fault == options.only]
    if options.of:
        wanted = names_of(options.of.split(","))
        planned = [trial for trial in planned if trial.fault in wanted]
    n_clean = options.clean if options.clean is not None else CLEAN if options.full else CLEAN_SAMPLE
    if not options.full and not options.only:
        planned = _sample(planned, SAMPLE)
    runs = clean_runs(n_clean, options.seed)
    lacking = False
    if options.as_is:
        n_planned, n_runs = len(planned), len(runs)
        planned, runs = kept.known(options.keep, planned, options.shows), kept.known(options.keep, runs)
        lacking = len(planned) < n_planned or len(runs) < n_runs
        _say(f"faults: {len(planned)} of {n_planned} planned; clean runs: {len(runs)} of {n_runs} planned")
    began = time.perf_counter()
    one = _attempt_all if options.shows == "all" else _attempt_traced
    done = list(kept.outcomes(options.keep, planned, options.shows, partial(_each, one, jobs=options.jobs)))
    _say(*faults_text(done))
    said = kept.alarms(options.keep, runs, partial(_each, _clean, jobs=options.jobs))
    alarms = [(run, what) for run, what in zip(runs, said, strict=True) if what]
    _say(*clean_text(runs, alarms))
    sys.stderr.write(f"{time.perf_counter() - began:.0f} s\n")
    reached = all(f.reached for f in figures(done))
    return 0 if reached and not alarms and not lacking and (done or runs) else 1


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join([*lines, ""]))
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arithmetic", default=",".join(KINDS), help=f"comma list of {', '.join(KINDS)}")
    parser.add_argument("--models", default="tiny,random", help="tiny, random, seeds of random ones")
    parser.add_argument("--full", action="store_true", help=f"every fault, and {CLEAN} clean runs")
    parser.add_argument("--seed", type=int, default=0, help="of the sample, the places and the clean runs")
    parser.add_argument("--shows", choices=("trace", "all"), default="all", help="what the backends show")
    parser.add_argument("--clean", type=int, help="how many clean runs")
    parser.add_argument("--only", choices=sorted(FAULTS), metavar="FAULT", help="one fault, by name")
    parser.add_argument("--of", default="", metavar="KINDS", help=f"faults of a comma list of {', '.join(GROUPS)}")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="results as they come; what it has of this code is not repeated"
    )
    parser.add_argument("--as-is", action="store_true", help="figures of what --keep has; exit 1 if not all")
    return parser


def _sample(planned: Sequence[Trial], n: int) -> list[Trial]:
    """Every n-th, so that all kinds of faults are met."""
    step = max(1, len(planned) // n)
    return list(planned[::step])


def _each(run: Callable[[_In], _Out], items: Sequence[_In], jobs: int) -> Iterator[_Out]:
    """The results in order, with a count on stderr."""
    with ProcessPoolExecutor(jobs) as pool:
        found = map(run, items) if jobs == 1 else pool.map(run, items)
        for i, result in enumerate(found, 1):
            if i % 20 == 0:
                sys.stderr.write(f"{i} of {len(items)}\n")
            yield result


def _attempt_all(trial: Trial) -> Outcome:
    with threadpool_limits(1, user_api="blas"):
        return attempt(trial, (TRACE, STATE, LOGITS))


def _attempt_traced(trial: Trial) -> Outcome:
    with threadpool_limits(1, user_api="blas"):
        return attempt(trial, (TRACE,))


def _clean(run: Clean) -> str:
    with threadpool_limits(1, user_api="blas"):
        return false_alarm(run)


if __name__ == "__main__":
    raise SystemExit(main())
