"""One picture of a run: what was chosen, the mixture, the weights over time.

Drawn from `events.jsonl` and `selections/`, so a resumed run's picture shows the whole run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.run.log import read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Events = Sequence[Mapping[str, Any]]
Panel = tuple[str, Callable[["Axes"], None]]

#: Columns of the map of chosen rows; each shows the rows of one slice of the data set.
MAP_COLUMNS = 120

#: Readable on white and distinct for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B8A900", "#555555")


def draw(folder: Path) -> Path | None:
    """Write `picture.png` into a run's `dataflex` folder.

    Args:
        folder: `output_dir/dataflex`.

    Returns:
        The picture, or None where the run has logged nothing that can be drawn.
    """
    events = read_events(folder)
    panels = _panels(events, folder)
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    name = folder.parent.name or "run"
    figure.suptitle(f"{name}: {', '.join(sorted({e['component'] for e in events}))}", fontsize=12)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, fill) in zip(axes, panels, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        fill(axis)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("optimizer step")
    path = folder / "picture.png"
    figure.savefig(path, dpi=120)
    return path


def _panels(events: Events, folder: Path) -> list[Panel]:
    """List the panels to draw, from top to bottom."""
    panels: list[Panel] = []
    scored = [e for e in events if "score_mean" in e.get("numbers", {})]
    if scored:
        panels.append(("score of the chosen rows: smallest, mean, largest",
                       lambda axis: _band(axis, scored, "score", "numbers")))  # fmt: skip
    selections = _selections(folder)
    if selections:
        panels.append(("which rows were chosen", lambda axis: _map(axis, selections)))
    mixed = [e for e in events if e.get("proportions")]
    if mixed:
        panels.append(("mixture of the domains", lambda axis: _mixture(axis, mixed)))
    by_domain = [e for e in events if e.get("weights")]
    if by_domain:
        panels.append(("weights of the domains", lambda axis: _lines(axis, by_domain, "weights")))
    weighted = [e for e in events if "weight_mean" in e]
    if weighted:
        panels.append(("weights of the samples: smallest, mean, largest",
                       lambda axis: _band(axis, weighted, "weight", None)))  # fmt: skip
    kept = [e for e in events if e.get("kept")]
    if kept:
        panels.append(("rows kept by each stage", lambda axis: _lines(axis, kept, "kept")))
    return panels


def _selections(folder: Path) -> list[tuple[int, list[int]]]:
    """Read (step, chosen positions) of every selection, sorted by step."""
    found = []
    for path in (folder / "selections").glob("step_*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        found.append((int(path.stem.removeprefix("step_")), content["indices"]))
    return sorted(found)


def _band(axis: Axes, events: Events, name: str, inside: str | None) -> None:
    """Draw a line for the mean and a band from minimum to maximum."""
    steps = [e["step"] for e in events]
    values = [e[inside] if inside else e for e in events]
    low, mean, high = ([v[f"{name}_{end}"] for v in values] for end in ("min", "mean", "max"))
    axis.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axis.plot(steps, mean, color=COLOURS[0], marker="o" if len(steps) < 30 else None, markersize=4)
    axis.margins(x=0.02)


def _map(axis: Axes, selections: Sequence[tuple[int, list[int]]]) -> None:
    """Draw the chosen share of each slice of the data set: a row of the map per update."""
    last = max(max(rows) for _, rows in selections) + 1
    columns = min(MAP_COLUMNS, last)
    edges = np.linspace(0, last, columns + 1)
    table = np.stack([np.histogram(np.unique(rows), edges)[0] for _, rows in selections])
    share = table / np.maximum(np.histogram(np.arange(last), edges)[0], 1)
    shown = axis.imshow(share, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest",
                        extent=(0, last, len(selections) - 0.5, -0.5))  # fmt: skip
    ticks = np.unique(np.linspace(0, len(selections) - 1, min(len(selections), 8)).astype(int))
    axis.set_yticks(ticks, [f"step {selections[i][0]}" for i in ticks], fontsize=8)
    axis.set_xlabel("position in the training set", fontsize=8)
    axis.figure.colorbar(shown, ax=axis, label="share chosen", pad=0.01)


def _mixture(axis: Axes, events: Events) -> None:
    """Draw proportions as stacked steps: each answer holds until the next one."""
    names = list(events[0]["proportions"])
    steps = [e["step"] for e in events]
    end = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    table = np.array([[e["proportions"].get(name, 0.0) for name in names] for e in events])
    held = np.vstack([table, table[-1:]])
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    axis.stackplot([*steps, end], held.T, labels=names, step="post", colors=colours, alpha=0.85)
    axis.set_ylim(0, 1)
    axis.margins(x=0)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _lines(axis: Axes, events: Events, key: str) -> None:
    """Draw one line per entry of a mapping."""
    for i, name in enumerate(sorted({name for e in events for name in e[key]})):
        points = [(e["step"], e[key][name]) for e in events if name in e[key]]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name,
                  color=COLOURS[i % len(COLOURS)])  # fmt: skip
    axis.set_ylim(bottom=0)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
