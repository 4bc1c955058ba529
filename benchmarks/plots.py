"""Plots of docs/figures.md: held-out loss against the operations of selecting and of training.

    uv run python benchmarks/plots.py              # rewrites docs/images/{rules,real}.svg
    uv run python benchmarks/plots.py --check      # exits 1 where one shows other numbers

Operations are counted by quality/flops.py, losses are those of results/rules.csv (step 60, nothing
clipped, as in the first table) and results/real.csv (mean over the three targets of a seed). A bar
is the 95% interval of the mean over seeds, which differences to another method on the same seeds
are far below: those are in the tables. A plot holds a hash of its numbers, by which a test knows
that it is of the CSVs beside it; the same numbers give the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "quality"))

import flops
from report import RESULTS, echo, read
from tables import LEVEL, OVER_ALL, REAL_PART, ROOT, Line, newest, part_of

IMAGES = ROOT / "docs" / "images"

#: Drawn as lines across: what choosing can reach, and what it must beat.
ACROSS = ("oracle", "random")
#: Points whose costs differ by less than this factor are drawn side by side, this far apart.
ALIKE, APART = 1.05, 1.025
#: Least distance of two names, as a part of the plot's height.
LINE_HEIGHT = 0.048
#: Operations that the axis counts in.
UNIT = 1e12

#: What a method goes by -> colour and mark; Okabe and Ito's colours, which all eyes tell apart.
FAMILIES = {
    "gradients": ("#0072B2", "o"),
    "gradients, Fisher metric": ("#D55E00", "D"),
    "hidden states": ("#009E73", "s"),
    "losses": ("#CC79A7", "^"),
    "words": ("#000000", "v"),
    "bergson": ("#7F7F7F", "P"),
}
#: Of lines across and their names.
GREY = "#555555"


@dataclass(frozen=True)
class Point:
    """A method of a plot.

    Attributes:
        method: its name in the CSV.
        operations: of selecting and training; None where they are not counted.
        loss: held-out loss, mean over seeds.
        half: of its 95% interval.
        seeds: that it has.
    """

    method: str
    operations: float | None
    loss: float
    half: float
    seeds: int


#: First words of the methods that do not go by gradients.
GOES_BY = {
    "near (hidden states)": "hidden states",
    "rds_plus": "hidden states",
    "tsds": "hidden states",
    "loss": "losses",
    "mirror": "losses",
    "delta_loss": "losses",
    "bm25": "words",
    "oracle": "words",
    "random": "words",
}


def family(method: str) -> str:
    """Tell by what a method goes; what stands behind its first comma says how it chooses.

    Examples:
        >>> family("rds_plus, top")
        'hidden states'
    """
    if method.startswith("bergson"):
        return "bergson"
    first = method.partition(",")[0]
    if first in GOES_BY:
        return GOES_BY[first]
    return "gradients, Fisher metric" if "fisher" in method else "gradients"


def point(method: str, losses: Sequence[float], shape: flops.Shape) -> Point:
    """Sum up one method's losses, one for each seed (two at least)."""
    from scipy import stats

    error = statistics.stdev(losses) / len(losses) ** 0.5
    half = float(stats.t.ppf(1 - LEVEL / 2, len(losses) - 1)) * error
    chosen = flops.selecting(method, shape)
    operations = None if chosen is None else chosen + flops.training(shape)
    return Point(method, operations, statistics.mean(losses), half, len(losses))


def rules(path: Path = RESULTS / "rules.csv") -> list[Point]:
    """Gather the methods of the first table of rules.csv at the last step."""
    lines = [line for line in read(path)
             if line["loss"] and not line["clip"] and not line["method"].endswith(OVER_ALL)
             ]  # fmt: skip
    found: dict[str, list[float]] = {}
    for (method, _), line in newest(lines, "method", "seed").items():
        found.setdefault(method, []).append(float(line["loss"]))
    return [point(method, losses, flops.RULES) for method, losses in found.items()]


def real(path: Path = RESULTS / "real.csv") -> list[Point]:
    """Gather the methods of real.csv: mean over the targets, seed by seed."""
    lines: Iterable[Line] = [
        line for line in read(path) if line["loss"] and part_of(line) == REAL_PART
    ]
    by_seed: dict[tuple[str, str], list[float]] = {}
    for (method, _, seed), line in newest(lines, "method", "target", "seed").items():
        by_seed.setdefault((method, seed), []).append(float(line["loss"]))
    targets = max(map(len, by_seed.values()))
    found: dict[str, list[float]] = {}
    for (method, _), losses in by_seed.items():
        if len(losses) == targets:  # a seed that is being measured has not all of them
            found.setdefault(method, []).append(statistics.mean(losses))
    return [point(method, losses, flops.REAL) for method, losses in found.items()]


PLOTS = {"rules": rules, "real": real}
LABELS = {
    "rules": "loss on the rule's held-out rows",
    "real": "held-out loss, mean over three targets",
}


def digest(points: Sequence[Point]) -> str:
    """Hash what a plot shows, to four digits."""
    shown = [[p.method, p.operations and f"{p.operations:.3e}", f"{p.loss:.4f}", f"{p.half:.3f}",
              p.seeds] for p in points]  # fmt: skip
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def shows(name: str, points: Sequence[Point]) -> bool:
    """Tell whether the plot of that name is of these points."""
    path = IMAGES / f"{name}.svg"
    return path.exists() and digest(points) in path.read_text(encoding="utf-8")


# ---- drawing -----------------------------------------------------------------------------------


def beside_each_other(points: Sequence[Point]) -> dict[str, float]:
    """Return where points go along x, in units: those of nearly equal cost side by side."""
    groups: list[list[tuple[float, float, str]]] = []
    known = [(p.operations / UNIT, p.loss, p.method) for p in points
             if p.operations and p.method not in ACROSS]  # fmt: skip
    for operations, loss, method in sorted(known):
        if not groups or operations > ALIKE * groups[-1][-1][0]:
            groups.append([])
        groups[-1].append((operations, loss, method))
    return {
        method: statistics.mean(x for x, _, _ in group) * APART ** (place - (len(group) - 1) / 2)
        for group in groups for place, (_, _, method) in enumerate(group)
    }  # fmt: skip


def spread_out(wanted: Sequence[float], least: float) -> list[float]:
    """Move ascending heights up and down until neighbours are `least` apart, as little as it takes.

    Examples:
        >>> spread_out([0.0, 0.0, 3.0], 1.0)
        [-0.5, 0.5, 3.0]
    """
    groups: list[tuple[float, int]] = []  # middle, members
    for height in wanted:
        groups.append((height, 1))
        while len(groups) > 1:
            (low, below), (high, above) = groups[-2:]
            if high - low >= least * (below + above) / 2:
                break
            middle = (low * below + high * above) / (below + above)
            groups[-2:] = [(middle, below + above)]
    return [middle + least * (i - (members - 1) / 2)
            for middle, members in groups for i in range(members)]  # fmt: skip


def draw(points: Sequence[Point], label: str) -> Any:  # noqa: ANN401 - a figure of matplotlib
    """Draw one plot: points with their intervals, names in a column at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2))
    axes = figure.add_axes((0.08, 0.1, 0.6, 0.83))
    places = beside_each_other(points)
    for each in points:
        colour, mark = FAMILIES[family(each.method)]
        if each.method in places:
            axes.errorbar(
                places[each.method], each.loss, each.half, fmt=mark, color=colour, markersize=7,
                elinewidth=1.2, capsize=3, markeredgecolor="white", markeredgewidth=0.7,
                zorder=3,
            )  # fmt: skip
        else:
            dashes = {"oracle": "--", "random": "-."}.get(each.method, ":")
            axes.axhline(each.loss, color=GREY, linewidth=1.2, linestyle=dashes, zorder=1)
    _scale(axes, places)
    axes.set_xlabel("FLOPs of selecting and training, in units of 10¹² (log scale)", fontsize=12)
    axes.set_ylabel(label, fontsize=12)
    axes.grid(visible=True, axis="y", color="#E5E5E5", zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _name(axes, points, places)
    _explain(axes, points)
    return figure


def _scale(axes: Any, places: dict[str, float]) -> None:  # noqa: ANN401 - of matplotlib
    """Make x logarithmic, with plain numbers at 1, 2, 3, 5 of every power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(places.values()), max(places.values())
    margin = (high / low) ** 0.06
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=11)


def _name(axes: Any, points: Sequence[Point], places: dict[str, float]) -> None:  # noqa: ANN401
    """Write the methods' names at the right, each joined to its point."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ordered = sorted(points, key=lambda p: p.loss)
    wanted = [(p.loss - low) / (high - low) for p in ordered]
    for each, height in zip(ordered, spread_out(wanted, LINE_HEIGHT), strict=True):
        drawn = each.method in places
        axes.annotate(
            each.method if each.operations else f"{each.method} (not counted)",
            xy=(places[each.method] if drawn else 1.0, each.loss),
            xycoords="data" if drawn else axes.get_yaxis_transform(),
            xytext=(1.05, height), textcoords="axes fraction", va="center", fontsize=11,
            color=FAMILIES[family(each.method)][0] if drawn else GREY, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.6, "shrinkA": 0,
                        "shrinkB": 4 if drawn else 0, "relpos": (0, 0.5), "zorder": 2},
        )  # fmt: skip


def _explain(axes: Any, points: Sequence[Point]) -> None:  # noqa: ANN401 - of matplotlib
    """Add a legend of what methods go by."""
    from matplotlib.lines import Line2D

    shown = {family(p.method) for p in points if p.operations and p.method not in ACROSS}
    marks = [Line2D([], [], color=colour, marker=mark, linestyle="", markersize=7, label=name)
             for name, (colour, mark) in FAMILIES.items() if name in shown]  # fmt: skip
    axes.legend(handles=marks, fontsize=11, loc="lower left", bbox_to_anchor=(-0.09, 1.0),
                ncols=len(marks), frameon=False, columnspacing=1.6, handletextpad=0.3)  # fmt: skip


def write(name: str, points: Sequence[Point]) -> None:
    """Write a plot; its file depends on nothing but the points and matplotlib's version."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = name
    about = {"Date": None, "Creator": None, "Description": f"numbers {digest(points)}"}
    path = IMAGES / f"{name}.svg"
    draw(points, LABELS[name]).savefig(path, format="svg", metadata=about)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def main() -> int:
    """Rewrite the plots, or say which of them are out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = [name for name, gather in PLOTS.items() if not shows(name, gather())]
    for name in PLOTS if not options.check else stale:
        echo(f"{name}.svg: " + ("out of date" if options.check else "written"))
        if not options.check:
            write(name, PLOTS[name]())
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
