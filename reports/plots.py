"""Cells -> one picture (PNG): bars of prefill and decode with intervals, roofline, quality against speed, history."""

from __future__ import annotations

import io
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.rows import Row
from reports.cell_history import histories
from reports.cells import Cell, ordered, scheme_class
from reports.digits import number
from reports.points import frontier_point, pareto, roofline_points
from reports.recommend import workload_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from reports.cell_history import Points

    Pasts = Sequence[dict[str, Points]]

#: A cell, its speed, its divergence.
Placed = tuple[Cell, float, float]

#: What one picture holds legibly; more is counted in it.
MOST_BARS, MOST_HISTORIES = 40, 12

#: Speeds further apart than this are drawn on a logarithmic axis.
_LINEAR = 50

#: An exact scheme has no divergence; on a logarithmic axis it stands here.
LEAST_KL = 1e-9

#: Told apart also by people who do not tell red from green (Okabe and Ito's, and four more).
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#7a5c00",
    "#6a4bc4",
    "#56b4e9",
    "#b3261e",
    "#55606b",
    "#8a9a00",
)


def draw(cells: Sequence[Cell], title: str) -> bytes:
    """The picture. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = ordered(cell for cell in cells if cell.first.kind == "measured")
    colours = {b: _COLOURS[i % len(_COLOURS)] for i, b in enumerate(sorted({cell.first.backend for cell in own}))}
    bars = max(
        1,
        min(MOST_BARS, max((sum(cell.speed(m) is not None for cell in own) for m in ("prefill", "decode")), default=1)),
    )
    heights = (1.4 + 0.24 * bars, 4.6, 3.6)
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, height_ratios=heights)
    figure.suptitle(f"{title}: {_about(own)}", fontsize=13)
    _bars(figure.add_subplot(grid[0, 0]), own, "decode", colours)
    _bars(figure.add_subplot(grid[0, 1]), own, "prefill", colours)
    _roofline(figure.add_subplot(grid[1, 0]), own, colours)
    _frontier(figure.add_subplot(grid[1, 1]), own, colours)
    pasts = histories(own)
    _history(figure.add_subplot(grid[2, 0]), own, pasts, "decode", colours)
    _history(figure.add_subplot(grid[2, 1]), own, pasts, "prefill", colours)
    _legend(figure, colours)
    out = io.BytesIO()
    figure.savefig(out, dpi=120, format="png")
    return out.getvalue()


def _about(cells: Sequence[Cell]) -> str:
    passed = sum(cell.verdict == "PASS" for cell in cells)
    others = sorted({cell.first.kind for cell in cells} - {"measured"})
    return f"{len(cells)} cells measured, {passed} PASS" + (
        f"; {', '.join(others)} rows are not drawn" if others else ""
    )


def _name(cell: Cell, cells: Sequence[Cell]) -> str:
    """What tells the cell from the others, as short as that goes."""
    row = cell.first
    more = [
        (cell.hardware, {c.hardware for c in cells}),
        (row.model, {c.first.model for c in cells}),
        (f"{row.threads} thr", {c.first.threads for c in cells}) if row.threads else ("", ()),
        (workload_of(cell), {workload_of(c) for c in cells}),
    ]
    return " · ".join([f"{row.backend} {row.scheme}", *(name for name, names in more if len(names) > 1)])


def _bars(axes: Axes, cells: Sequence[Cell], metric: str, colours: dict[str, str]) -> None:
    """Horizontal bars in groups of one quantization and workload, the fastest of each group on top."""
    timed = [(cell, row) for cell in cells if (row := cell.speed(metric)) is not None and row.value]
    kept = fastest(timed)[:MOST_BARS]
    names = [cell for cell, _ in kept]
    y, ticks, labels, drawn = 0.0, [], [], []
    for group in sorted({_group(cell) for cell, _ in kept}, key=_rank):
        for cell, row in kept:
            if _group(cell) != group or row.value is None:
                continue
            drawn.append((row.value, *(row.interval or (math.nan, math.nan)), colours[cell.first.backend]))
            ticks.append(y)
            labels.append(_name(cell, names))
            y -= 1
        y -= 0.6
    if drawn:
        values, lows, highs, shades = zip(*drawn, strict=True)
        axes.barh(ticks, values, color=shades, height=0.8)
        if max(values) > _LINEAR * min(values):
            axes.set_xscale("log")
            axes.set_xlim(left=10 ** math.floor(math.log10(min(values)) - 0.3))
            axes.set_xlabel("logarithmic")
        axes.hlines(ticks, lows, highs, color="0.1", linewidth=1)
        axes.plot([*lows, *highs], [*ticks, *ticks], "|", color="0.1", markersize=5)
        for at, value, high in zip(ticks, values, highs, strict=True):
            end = value if math.isnan(high) else high
            axes.annotate(number(value), (end, at), va="center", fontsize=7, xytext=(5, 0), textcoords="offset points")
    axes.set_yticks(ticks, labels=labels, fontsize=7.5)
    axes.margins(x=0.14, y=0.01)
    left_out = f"; the {len(kept)} fastest of {len(timed)}" if len(timed) > len(kept) else ""
    failed = sum(bool(cell.judged) for cell in cells)
    axes.set_title(
        f"{metric}, tok/s: median, 95 % interval{left_out}" + (f"; {failed} did not pass" if failed else ""),
        fontsize=10,
    )
    _plain(axes)
    if not kept:
        _empty(axes, f"no cell has a {metric} speed")


def fastest(timed: Sequence[tuple[Cell, Row]]) -> list[tuple[Cell, Row]]:
    """The fastest of each workload, then the second of each, and so on: speeds of two workloads are not ranked."""
    ordered = sorted(timed, key=lambda pair: -(pair[1].value or 0.0))
    seen: Counter[str] = Counter()
    ranks = []
    for cell, _ in ordered:
        ranks.append(seen[workload_of(cell)])
        seen[workload_of(cell)] += 1
    return [ordered[i] for i in sorted(range(len(ordered)), key=lambda i: ranks[i])]


def _group(cell: Cell) -> tuple[str, str]:
    return scheme_class(cell.first) or "other", workload_of(cell)


def _rank(group: tuple[str, str]) -> tuple[int, str, str]:
    known = ("f32", "f16", "bf16", "int8", "int5", "int4", "int3")
    name, workload = group
    return (known.index(name) if name in known else len(known), name, workload)


def _roofline(axes: Axes, cells: Sequence[Cell], colours: dict[str, str]) -> None:
    points = [(cell, point) for cell in cells for point in roofline_points(cell)]
    axes.set_title("roofline: circles decode, squares prefill", fontsize=10)
    if not points:
        _empty(axes, "no cell says the bytes of weights that it reads")
        return
    for metric, marker in (("decode", "o"), ("prefill", "s")):
        own = [
            (point["x"], point["y"] / 1e9, colours[c.first.backend]) for c, point in points if point["metric"] == metric
        ]
        if own:
            xs, ys, shades = zip(*own, strict=True)
            axes.scatter(xs, ys, c=shades, marker=marker, s=24, alpha=0.85)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of weights read")
    axes.set_ylabel("Gop/s")
    drawn = [_roof(axes, hardware, points) for hardware in dict.fromkeys(cell.hardware for cell, _ in points)]
    if not any(drawn):
        axes.set_title("roofline (no roof: no cell has a roofline fraction)", fontsize=10)
    _plain(axes, both=True)


def _roof(axes: Axes, hardware: str, points: Sequence[tuple[Cell, dict[str, Any]]]) -> bool:
    """What a machine can do at each intensity, as its own rows say; whether they do."""
    own = [point for cell, point in points if cell.hardware == hardware and point["roof"]]
    slopes = [point["roof"] / point["x"] for point in own if point["metric"] == "decode"]
    flats = [point["roof"] for point in own if point["metric"] == "prefill"]
    if not own:
        return False
    slope, flat = statistics.median(slopes) if slopes else math.inf, max(flats, default=math.inf)
    low, high = (math.log10(end) for end in axes.get_xlim())
    xs = [10 ** (low + (high - low) * i / 200) for i in range(201)]
    told = [f"{slope / 1e9:.4g} GB/s"] * bool(slopes) + [f"{flat / 1e12:.3g} Top/s"] * bool(flats)
    axes.plot(
        xs, [min(slope * x, flat) / 1e9 for x in xs], color="0.2", linewidth=1.2, label=f"{hardware}: {', '.join(told)}"
    )
    axes.legend(fontsize=8, loc="lower right")
    return True


def fronts(known: Sequence[tuple[Cell, dict[str, float]]]) -> list[tuple[list[Placed], list[tuple[float, float]]]]:
    """Cells with speed and divergence, and those that no other beats: each model, machine, workload by itself."""
    places: dict[Any, list[Placed]] = {}
    for cell, point in known:
        kind = (cell.hardware, cell.first.model, cell.first.workload)
        places.setdefault(kind, []).append((cell, point["speed"], max(point["kl"], LEAST_KL)))
    return [
        (own, sorted(own[i][1:] for i in pareto([(speed, -kl) for _, speed, kl in own]))) for own in places.values()
    ]


def _frontier(axes: Axes, cells: Sequence[Cell], colours: dict[str, str]) -> None:
    known = [(cell, point) for cell in cells if (point := frontier_point(cell)) is not None]
    axes.set_title("quality against speed (right and down is better)", fontsize=10)
    if not known:
        _empty(axes, "no cell has a decode speed and a divergence;\nrwkv-bench quality measures it")
        return
    for own, best in fronts(known):
        axes.plot(*zip(*best, strict=True), "--", color="0.5", linewidth=1)
        shades = [colours[cell.first.backend] for cell, _, _ in own]
        axes.scatter([speed for _, speed, _ in own], [kl for _, _, kl in own], c=shades, s=24)
        for cell, speed, kl in own:
            if (speed, kl) in best:
                axes.annotate(cell.first.scheme, (speed, kl), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("decode, tok/s")
    axes.set_ylabel("KL from the fp32 weights, nat/token")
    _plain(axes, both=True)


def _history(axes: Axes, cells: Sequence[Cell], pasts: Pasts, metric: str, colours: dict[str, str]) -> None:
    """Each cell's speeds over its first one, run by run."""
    known = [(cell, past[metric]) for cell, past in zip(cells, pasts, strict=True) if metric in past]
    axes.set_title(f"history of {metric}: over the first run; black: the level changed", fontsize=10)
    if not known:
        _empty(axes, "no cell was measured in two runs")
        return
    began: dict[str, str] = {}
    for point in sorted((point for _, points in known for point in points), key=lambda point: point["t"] or ""):
        began.setdefault(point["run"] or "", point["t"] or "")
    runs = list(began)
    for i, (cell, points) in enumerate(known[:MOST_HISTORIES]):
        base = points[0]["v"]
        xs = [runs.index(point["run"] or "") + (i / MOST_HISTORIES - 0.5) * 0.3 for point in points]
        axes.plot(
            xs,
            [point["v"] / base for point in points],
            "o-",
            color=colours[cell.first.backend],
            markersize=3,
            linewidth=1,
        )
        for x, point in zip(xs, points, strict=True):
            if "changed" in point:
                axes.plot(x, point["v"] / base, "v", color="0.1", markersize=7)
            if point["lo"] is not None:
                axes.vlines(x, point["lo"] / base, point["hi"] / base, color=colours[cell.first.backend], linewidth=0.8)
    axes.axhline(1, color="0.6", linewidth=0.8)
    shown = range(0, len(runs), max(1, math.ceil(len(runs) / 6)))
    axes.set_xticks(list(shown), labels=[began[runs[i]][:16].replace("T", "\n") for i in shown], fontsize=7.5)
    if len(known) > MOST_HISTORIES:
        axes.set_title(
            f"history of {metric}: the first {MOST_HISTORIES} of {len(known)} cells, over their first run", fontsize=10
        )
    _plain(axes)


def _plain(axes: Axes, both: bool = False) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both" if both else "x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _empty(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color="0.4")
    axes.set_xticks([])
    axes.set_yticks([])


def _legend(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=backend) for backend, colour in colours.items()]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(8, max(1, len(patches))), fontsize=8, frameon=False
    )
