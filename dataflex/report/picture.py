"""One picture of a run: its losses, and what the strategy decided at each update.

Drawn from `events.jsonl`, `selections/` and `trainer_state.json`, so a resumed run's picture shows
the whole run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dataflex.report import panels
from dataflex.report.records import Records
from gradstore.format.names import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Updates that are marked by lines; more would hide what they mark.
MARKED_UPDATES = 30

#: Kind of an event -> what a strategy decides there.
DECIDES: Mapping[str, str] = {
    "select": "Rows selected",
    "mix": "Domains mixed",
    "weight": "Samples weighted",
    "reorder": "Rows put in order",
    "pipeline": "Data decided",
}


class Panel(NamedTuple):
    """One panel: title, what fills its axes, and whether these count optimizer steps."""

    title: str
    fill: Callable[[Axes, Records], None]
    by_step: bool = True


def draw(folder: Path) -> Path | None:
    """Write `picture.png` into a run's `dataflex` folder.

    Args:
        folder: `output_dir/dataflex`.

    Returns:
        The picture, or None where the run has logged nothing that can be drawn.
    """
    run = Records.read(folder)
    chosen = panels_of(run)
    if not run.events or not chosen:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.9 + 2.5 * len(chosen)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title_of(run), fontsize=12, parse_math=False)
    axes = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for i, (axis, panel) in enumerate(zip(axes, chosen, strict=True)):
        axis.set_title(printable(panel.title), loc="left", fontsize=10, parse_math=False)
        axis.spines[["top", "right"]].set_visible(False)
        panel.fill(axis, run)
        if panel.by_step:
            _count_steps(axis, run, named=i + 1 == len(chosen) or not chosen[i + 1].by_step)
    path = folder / "picture.png"
    with warnings.catch_warnings():
        # Names may hold characters that no font here has; they become boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=120)
    return path


def title_of(run: Records) -> str:
    """Name what is decided, the strategy that does it, and the run."""
    what, by = heading(run)
    return printable(f"{what} by {by}\nrun {run.name}, {run.end} steps")


def heading(run: Records) -> tuple[str, str]:
    """Name what is decided, and the strategy that does it."""
    by = ", ".join(sorted({str(e["component"]) for e in run.events}))
    if stages := run.names("kept"):
        by += f" ({', '.join(stages)})"
    return DECIDES.get(str(run.events[0]["event"]), "Data decided"), by


def panels_of(run: Records) -> list[Panel]:
    """List the panels to draw, from top to bottom."""
    found = []
    if run.losses:
        marks = ", updates dotted" if 0 < len(run.updates) <= MARKED_UPDATES else ""
        found.append(Panel(f"training loss{marks}", panels.losses))
    found += [*_selected(run), *_ordered(run)]
    if len(run.names("proportions")) > 1:
        found.append(Panel("mixture of the domains", panels.mixture))
    if len(run.names("weights")) > 0:
        found.append(Panel("weights of the domains", panels.lines("weights")))
    if run.numbers("weight_mean"):
        found.append(Panel("weights of the samples: smallest to largest, mean", panels.weights))
    if len(run.names("kept")) > 0:
        found.append(Panel("rows kept by each stage", panels.lines("kept")))
    return found


def _selected(run: Records) -> list[Panel]:
    """List the panels of chosen rows: their scores, and where they come from."""
    if not run.chosen:
        return []
    found = []
    scored = [each for each in run.chosen if each.has_scores]
    if len(scored) > panels.MOST_CURVES:
        found.append(Panel("scores of the chosen rows: smallest to largest, mean", panels.scores))
    elif scored:
        found.append(
            Panel("scores of the chosen rows, a line per update", panels.ranked, by_step=False)
        )
    if len(run.sets) > 1:
        found.append(Panel("data sets of the chosen rows", panels.by_set, by_step=False))
    elif kinds := [each.kinds for each in run.chosen if each.kinds]:
        title = f"chosen rows by {kinds[-1]['column']}"
        found.append(Panel(title, panels.by_kind, by_step=False))
    elif len(run.names("proportions")) < 2:
        width = panels.slice_width(run)
        each = "is one row" if width == 1 else f"is {width} neighbouring rows"
        title = f"which rows of {run.only_set} were chosen: a column {each}, a line an update"
        found.append(Panel(title, panels.positions, by_step=False))
    return found


def _ordered(run: Records) -> list[Panel]:
    """List the panel of rows in the order in which they are trained on."""
    if not run.orders:
        return []
    scored = any(each.has_scores for each in run.orders)
    what = "score" if scored else "position in the training set"
    return [Panel(f"{what} of the rows, in the order they are trained on", panels.order)]


def _count_steps(axis: Axes, run: Records, *, named: bool) -> None:
    """Count the x axis in whole steps of the run; only the lowest of a group is named."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(-0.01 * run.end, 1.01 * run.end)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if named:
        axis.set_xlabel("optimizer step", fontsize=9)
    if len(run.updates) <= MARKED_UPDATES:
        for step in run.updates:
            axis.axvline(step, color="#888888", linewidth=0.7, linestyle=":", zorder=0)
