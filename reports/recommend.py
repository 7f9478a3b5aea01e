"""Which cell to use under limits of memory, speed and quality: what meets them, why the others do not, the frontier.

A limit holds where the whole 95 % interval does. What is not known meets no limit and is named; nothing is assumed
of a scheme or a backend that was not measured. Speeds at different prompts or batches are not ranked against each
other. A cell without a PASS verdict is never recommended, nor is one that
failed, crashed or hung in a run as new as that which passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.rows import Row
from reports.cells import ENDED, NOT_RUN, Cell, machine_of
from reports.digits import number
from reports.points import pareto
from reports.row_fields import device_bytes

#: What the best is the best of.
AIMS = ("decode", "prefill", "memory", "quality")


@dataclass(frozen=True)
class Limits:
    """What must hold; None is no limit. ``memory`` in bytes, ``speed`` in tok/s of decode, ``kl`` in nat a token."""

    memory: float | None = None
    speed: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A cell with what it is judged by; None is unknown. ``why``: what keeps it from being recommended."""

    cell: Cell
    decode: Row | None
    prefill: Row | None
    memory: int | None
    kl: Row | None
    why: tuple[str, ...] = ()
    on_frontier: bool = False
    point: str = ""

    @property
    def name(self) -> str:
        """``onnx q4f16_1``, with threads and workload where these vary (``point``)."""
        row = self.cell.first
        return f"{row.backend} {row.scheme}{self.point and f' ({self.point})'}"


@dataclass(frozen=True)
class Advice:
    """Of one model on one machine, at one workload.

    workload  ``256+64``, prompt and decode tokens, and the batch; empty where speeds of no more than one are known
    best      None where nothing meets the limits
    alike     others that meet them and whose intervals overlap with the best one's: not told apart from it
    aside     what the frontier is over, and how many cells it leaves aside because that is unknown of them
    """

    hardware: str
    model: str
    best: Candidate | None
    alike: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    aside: str
    workload: str = ""


def recommend(cells: Sequence[Cell], limits: Limits, aim: str = "decode") -> list[Advice]:
    """Advice for each model on each machine at each workload, in the order of the cells.

    What nobody ran (claims) is no candidate.
    """
    run = [cell for cell in cells if cell.first.kind in ("measured", "recorded")]
    places = dict.fromkeys((cell.hardware, cell.first.model) for cell in run)
    found = []
    for hardware, model in places:
        there = [c for c in run if (c.hardware, c.first.model) == (hardware, model)]
        for workload, own in _by_workload(there):
            found.append(replace(_advice(hardware, model, own, there, limits, aim), workload=workload))
    return found


def _by_workload(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Cells by the workload of their speeds. One without speeds stands with its workload, or with each where it has
    none of these."""
    timed = [cell for cell in cells if cell.speed("decode") is not None or cell.speed("prefill") is not None]
    names = dict.fromkeys(workload_of(cell) for cell in timed)
    if len(names) < 2:
        return [("", list(cells))]
    return [(name, [c for c in cells if workload_of(c) == name or workload_of(c) not in names]) for name in names]


def workload_of(cell: Cell) -> str:
    """``256+64``: prompt and decode tokens, and ``×8`` for a batch of 8; empty where it is not known."""
    work = cell.first.workload
    if work is None:
        return ""
    return f"{work.prompt_tokens}+{work.decode_tokens}" + (f"×{work.batch}" if work.batch > 1 else "")


def _points(cells: Sequence[Cell]) -> list[str]:
    """What tells cells of one backend and scheme apart, as far as that varies: ``2 threads, 256+64``."""
    kinds = [
        ["" if (n := cell.first.threads) is None else f"{n} thread{'s' * (n != 1)}" for cell in cells],
        [workload_of(cell) for cell in cells],
    ]
    varying = [kind for kind in kinds if len(set(filter(None, kind))) > 1]
    return [", ".join(filter(None, (kind[i] for kind in varying))) for i in range(len(cells))]


def _advice(
    hardware: str, model: str, cells: Sequence[Cell], there: Sequence[Cell], limits: Limits, aim: str
) -> Advice:
    """``there``: all cells of that model and machine, whose failures count."""
    points = _points(cells)
    found = [
        replace(_candidate(cell, there, limits, aim), point=point) for cell, point in zip(cells, points, strict=True)
    ]
    found, aside = _frontier(found)
    meeting = sorted((each for each in found if not each.why), key=lambda each: _merit(each, aim), reverse=True)
    best = meeting[0] if meeting else None
    alike = tuple(each for each in meeting[1:] if best is not None and _overlap(each, best, aim))
    rest = sorted((each for each in found if each.why), key=lambda each: (each.decode is None, -_speed(each.decode)))
    return Advice(hardware, model, best, alike, (*meeting, *rest), aside)


def _candidate(cell: Cell, cells: Sequence[Cell], limits: Limits, aim: str) -> Candidate:
    passed = cell.verdict == "PASS"
    decode, prefill = (cell.speed(metric) if passed else None for metric in ("decode", "prefill"))
    found = Candidate(cell, decode, prefill, memory_of(cell) if passed else None, cell.quality_of("kl_divergence"))
    if not passed:
        return replace(found, why=(_not_passed(cell),))
    later = _failed_since(cell, cells)
    why = [later, *_fallen(found, limits), _aimless(found, aim)]
    return replace(found, why=tuple(dict.fromkeys(reason for reason in why if reason)))


def memory_of(cell: Cell) -> int | None:
    """Peak of host and device together, and never less than the weights that a step reads; None if not measured.

    A row that an older version measured in a process with others may have grown by less; now it has no peak.
    """
    peak = max((row.peak_bytes for row in cell.rows if row.peak_bytes is not None), default=None)
    device = max((found for row in cell.rows if (found := device_bytes(row)) is not None), default=None)
    if peak is None and device is None:
        return None
    weights = max((row.weight_bytes or 0 for row in cell.rows), default=0)
    return max((peak or 0) + (device or 0), weights)


def _not_passed(cell: Cell) -> str:
    reason = next((row.reason for row in cell.rows if row.verdict == cell.verdict and row.reason), "")
    verdict = cell.verdict or "never judged: its parity is unknown"
    return f"{verdict}: {reason}" if reason and cell.verdict else verdict


def _failed_since(cell: Cell, cells: Sequence[Cell]) -> str:
    """That another run of the same backend and scheme on that machine ended badly, no earlier than this one passed."""
    for other in cells:
        bad = other.verdict not in ("PASS", "", *NOT_RUN)
        if bad and _subject(other) == _subject(cell) and (other.first.time or "") >= (cell.first.time or ""):
            how = "ended in" if other.verdict in ENDED else "says"
            return f"another run of it {how} {other.verdict}"
    return ""


def _subject(cell: Cell) -> tuple[object, ...]:
    row = cell.first
    return (row.backend, row.scheme, row.device, machine_of(row))


def _fallen(found: Candidate, limits: Limits) -> list[str]:
    """Limits that do not hold, or are not known to."""
    why = []
    if limits.speed is not None:
        why.append(_below(found.decode, limits.speed))
    if limits.memory is not None:
        if found.memory is None:
            why.append("memory unknown")
        elif not found.memory <= limits.memory:
            why.append(f"memory {size(found.memory)}, over {size(limits.memory)}")
    if limits.kl is not None:
        why.append(_above(found.kl, limits.kl))
    return why


def _below(row: Row | None, least: float) -> str:
    if row is None or row.value is None:
        return "decode speed unknown"
    low = row.value if row.interval is None else row.interval[0]
    if low >= least:
        return ""
    if row.value >= least:
        return f"decode {number(row.value)} tok/s, but its interval begins at {number(low)}, under {number(least)}"
    return f"decode {number(row.value)} tok/s, under {number(least)}"


def _above(row: Row | None, most: float) -> str:
    if row is None or row.value is None:
        return "divergence unknown (rwkv-bench quality measures it)"
    high = row.value if row.interval is None else row.interval[1]
    if high <= most:
        return ""
    if row.value <= most:
        return f"KL {row.value:.3g}, but its interval ends at {high:.3g}, over {most:g}"
    return f"KL {row.value:.3g}, over {most:g}"


def _aimless(found: Candidate, aim: str) -> str:
    """Without what it should be the best of, it cannot be the best."""
    known = {"decode": found.decode, "prefill": found.prefill, "memory": found.memory, "quality": found.kl}
    names = {"decode": "decode speed", "prefill": "prefill speed", "memory": "memory", "quality": "divergence"}
    return f"{names[aim]} unknown" if known[aim] is None else ""


def _merit(found: Candidate, aim: str) -> tuple[float, float]:
    """Larger is better; equal ones by decode speed."""
    first = {
        "decode": _speed(found.decode),
        "prefill": _speed(found.prefill),
        "memory": -float(found.memory or 0),
        "quality": -_speed(found.kl),
    }
    return first[aim], _speed(found.decode)


def _speed(row: Row | None) -> float:
    return 0.0 if row is None or row.value is None else row.value


def _overlap(a: Candidate, b: Candidate, aim: str) -> bool:
    """Whether their intervals of what is aimed at overlap; exact figures have none."""
    rows = {"decode": (a.decode, b.decode), "prefill": (a.prefill, b.prefill), "quality": (a.kl, b.kl)}
    if aim not in rows:
        return a.memory == b.memory
    ends = [(_speed(row), _speed(row)) if row is None or row.interval is None else row.interval for row in rows[aim]]
    return ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]


def _frontier(found: Sequence[Candidate]) -> tuple[list[Candidate], str]:
    """Marks the cells that pass and that no other beats in speed, memory and quality, as far as these are known."""
    passed = [i for i, each in enumerate(found) if each.cell.verdict == "PASS" and each.decode is not None]
    merits = {
        "speed": {i: _speed(found[i].decode) for i in passed},
        "memory": {i: -float(found[i].memory or 0) for i in passed if found[i].memory is not None},
        "quality": {i: -_speed(found[i].kl) for i in passed if found[i].kl is not None},
    }
    names = [name for name, known in merits.items() if known]
    whole = [i for i in passed if all(i in merits[name] for name in names)]
    best = {whole[i] for i in pareto([tuple(merits[name][i] for name in names) for i in whole])}
    told = f"the frontier is over {', '.join(names)}"
    if len(whole) < len(passed):
        n = len(passed) - len(whole)
        told += f"; {n} cells that pass are" if n > 1 else "; 1 cell that passes is"
        told += " left aside: one of these is unknown"
    missing = [name for name in merits if name not in names]
    told += f"; {' and '.join(missing)} unknown of every cell" if missing and names else ""
    marked = [replace(each, on_frontier=True) if i in best else each for i, each in enumerate(found)]
    return marked, told if names else "no cell that passes has a speed: there is no frontier"


def size(count: float) -> str:
    """``1.5 GiB``, ``110 MiB``."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
