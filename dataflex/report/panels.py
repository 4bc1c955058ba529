"""The panels of a picture: each fills the axes it is given from a run's records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.report.records import Chosen, FloatArray, Records
from gradstore.format.names import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Columns of the map of chosen rows; each shows the rows of one slice of the data set.
MAP_COLUMNS = 120

#: Updates whose scores are drawn as a line each; more become a band over the steps.
MOST_CURVES = 6

#: Updates with a bar of their own.
MOST_BARS = 16

#: Fewer points than this are marked one by one.
FEW = 30

#: Points of an order.
MOST_POINTS = 20_000

#: Characters of a name in a legend.
NAME_LENGTH = 28

#: Readable on white and distinct for colour-blind readers (Okabe and Ito); grey is for the rest.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B8A900")
REST_COLOUR = "#AAAAAA"


def losses(axis: Axes, run: Records) -> None:
    """Draw the loss of training, and those of evaluations where there are several of one set."""
    series = [("training", run.losses)]
    series += [(name or "evaluation", each) for name, each in run.evaluated.items() if each[1:]]
    for i, (_, points) in enumerate(series[: len(COLOURS)]):
        axis.plot(*_columns(points), color=COLOURS[i], **_marker(points))
    if len(series) > 1:
        _legend(axis, [name for name, _ in series[: len(COLOURS)]])


def ranked(axis: Axes, run: Records) -> None:
    """Draw the scores of each update's rows, from the best to the worst: a line per update."""
    scored = [each for each in run.chosen if each.has_scores]
    for i, each in enumerate(scored):
        found = np.sort(each.scores[np.isfinite(each.scores)])[::-1]
        axis.plot(np.arange(1, len(found) + 1), found, color=COLOURS[i], **_marker(found))
    _whole_numbers(axis)
    axis.set_xlabel("chosen row, from the largest score to the smallest", fontsize=9)
    _legend(axis, [f"step {each.step}" for each in scored])


def scores(axis: Axes, run: Records) -> None:
    """Draw mean and range of the scores of the chosen rows over the steps."""
    scored = [each for each in run.chosen if each.has_scores]
    ends = [(np.nanmin(e.scores), np.nanmean(e.scores), np.nanmax(e.scores)) for e in scored]
    _band(axis, [each.step for each in scored], np.asarray(ends, np.float64))


def weights(axis: Axes, run: Records) -> None:
    """Draw mean and range of the samples' weights over the steps."""
    names = ("weight_min", "weight_mean", "weight_max")
    ends = [[value for _, value in run.numbers(name)] for name in names]
    _band(axis, [step for step, _ in run.numbers(names[1])], np.asarray(ends).T)


def by_set(axis: Axes, run: Records) -> None:
    """Draw the data sets' shares of the chosen rows, a bar per update, beside those of all rows."""
    told = [e for e in run.events if e.get("chosen")]
    told = [told[i] for i in _even(len(told), MOST_BARS)]
    bars = [(f"step {e['step']}", e["chosen"]) for e in told]
    if pool := told[-1].get("train_sets"):
        bars = [("all rows", pool), *bars]
    _bars(axis, bars, run.sets)


def by_kind(axis: Axes, run: Records) -> None:
    """Draw the kinds' shares of the chosen rows, a bar per update, beside those of all rows."""
    told = [each for each in run.chosen if each.kinds]
    told = [told[i] for i in _even(len(told), MOST_BARS)]
    bars = [(f"step {each.step}", each.kinds["chosen"]) for each in told]
    pool = told[-1].kinds["all"]
    _bars(axis, [("all rows", pool), *bars], list(pool))


def slice_width(run: Records) -> int:
    """Return the rows in a column of the map of chosen rows."""
    return -(-run.train_rows // MAP_COLUMNS)


def positions(axis: Axes, run: Records) -> None:
    """Draw the chosen share of each slice of the data set: a line of the map per update."""
    found, width = run.chosen, slice_width(run)
    last = run.train_rows
    edges = np.append(np.arange(0, last, width), last)
    table = np.stack([np.histogram(np.unique(each.rows), edges)[0] for each in found])
    shown = axis.pcolormesh(edges, np.arange(len(found) + 1) - 0.5, table / np.diff(edges),
                            cmap="Blues", vmin=0)  # fmt: skip
    axis.hlines(np.arange(1, len(found)) - 0.5, 0, last, color="white", linewidth=2)
    axis.invert_yaxis()
    ticks = _even(len(found), 8)
    axis.set_yticks(ticks, [f"step {found[i].step}" for i in ticks], fontsize=8)
    axis.set_xlim(0, last)
    _whole_numbers(axis)
    axis.set_xlabel(printable(f"row of {run.only_set}"), fontsize=9, parse_math=False)
    if width > 1:
        axis.figure.colorbar(shown, ax=axis, label="share chosen", pad=0.01)


def order(axis: Axes, run: Records) -> None:
    """Draw a point per row: when it is trained on, and its score (or its position)."""
    scored = any(each.has_scores for each in run.orders)
    ends = [each.step for each in run.orders[1:]] + [run.end]
    parts = [
        (_times(each, end), each.scores if scored else each.rows.astype(np.float64))
        for each, end in zip(run.orders, ends, strict=True)
    ]
    when, what = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(when) > MOST_POINTS:
        # A sample at random: every n-th row of a periodic order could be one phase of it.
        kept = np.sort(np.random.default_rng(0).choice(len(when), MOST_POINTS, replace=False))
        when, what = when[kept], what[kept]
    size = 14.0 if len(when) < 300 else 4.0 if len(when) < 3000 else 1.0
    axis.scatter(when, what, s=size, color=COLOURS[0], linewidths=0)


def mixture(axis: Axes, run: Records) -> None:
    """Draw proportions as stacked steps: each answer holds until the next one."""
    events = [e for e in run.events if e.get("proportions")]
    names, table = _shares(
        [e["proportions"] for e in events], list(run.names("proportions")), whole=False
    )
    held = np.vstack([table, table[-1:]])
    steps = [int(e["step"]) for e in events]
    axis.stackplot([*steps, max(run.end, steps[-1] + 1)], held.T, step="post",
                   colors=_colours(names), alpha=0.85)  # fmt: skip
    axis.set_ylim(0, 1)
    axis.set_ylabel("share", fontsize=9)
    _legend(axis, names)


def lines(key: str) -> Callable[[Axes, Records], None]:
    """Make the panel of one line per entry of the mappings that events hold under `key`."""

    def fill(axis: Axes, run: Records) -> None:
        sums = run.names(key)
        largest = sorted(sums, key=lambda name: -sums[name])[: len(COLOURS)]
        names = [name for name in sums if name in largest]
        for name, colour in zip(names, COLOURS, strict=False):
            points = [(int(e["step"]), float(e[key][name]))
                      for e in run.events if name in (e.get(key) or {})]  # fmt: skip
            axis.plot(*_columns(points), color=colour, **_marker(points))
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        _legend(axis, names, more=len(sums) - len(names))

    return fill


# -- parts ----------------------------------------------------------------------------------------


def _bars(
    axis: Axes, bars: Sequence[tuple[str, Mapping[str, float]]], found: Sequence[str]
) -> None:
    """Draw shares of the names that were found, a labelled bar for each of the counts."""
    names, table = _shares([counts for _, counts in bars], found)
    base = np.zeros(len(bars))
    for share, colour in zip(table.T, _colours(names), strict=True):
        axis.bar(np.arange(len(bars)), share, bottom=base, color=colour, width=0.8)
        base += share
    turned = 45 if len(bars) > 9 else 0
    axis.set_xticks(np.arange(len(bars)), [name for name, _ in bars], fontsize=8, rotation=turned)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share", fontsize=9)
    _legend(axis, names)


def _band(axis: Axes, steps: Sequence[int], ends: FloatArray) -> None:
    """Draw the mean in its range; `ends` (n, 3): smallest, mean, largest."""
    low, mean, high = ends.T
    if len(steps) < FEW:
        axis.vlines(steps, low, high, color=COLOURS[0], alpha=0.3, linewidth=5)
    else:
        axis.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axis.plot(steps, mean, color=COLOURS[0], **_marker(steps))


def _shares(
    counts: Sequence[Any], names: Sequence[str], *, whole: bool = True
) -> tuple[list[str], FloatArray]:
    """Tabulate counts (n mappings) as shares (n, names), small ones together; `whole`: sum 1."""
    table = np.array([[float(each.get(name, 0)) for name in names] for each in counts])
    if whole:
        table /= np.maximum(table.sum(axis=1, keepdims=True), 1)
    if len(names) <= len(COLOURS):
        return list(names), table
    largest = np.sort(np.argsort(-table.sum(axis=0), kind="stable")[: len(COLOURS)])
    rest = np.delete(table, largest, axis=1).sum(axis=1, keepdims=True)
    shown = [names[i] for i in largest] + [f"{len(names) - len(largest)} others"]
    return shown, np.hstack([table[:, largest], rest])


def _times(each: Chosen, end: int) -> FloatArray:
    """Return the step (k,) in which each row is trained on, as a fraction."""
    return each.step + (np.arange(len(each.rows)) + 0.5) * (end - each.step) / len(each.rows)


def _colours(names: Sequence[str]) -> list[str]:
    return [*COLOURS, REST_COLOUR][: len(names)]


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _marker(points: Any) -> dict[str, Any]:  # noqa: ANN401 - anything with a length
    """Mark points that are few, so that a single one is seen."""
    return {"marker": "o" if len(points) < FEW else None, "markersize": 3.5, "linewidth": 1.5}


def _even(count: int, most: int) -> list[int]:
    """Return up to `most` numbers below `count`, evenly, the first and the last among them."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


def _whole_numbers(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axis: Axes, names: Sequence[str], more: int = 0) -> None:
    """Name what was drawn, in that order; names are shown as they are.

    matplotlib would leave out a name that begins with an underscore, and read $ as a formula.
    """
    drawn: Any = axis.lines or axis.containers or axis.collections
    legend = axis.legend(
        list(drawn)[: len(names)], [str(i) for i in range(len(names))], loc="center left",
        bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, title_fontsize=8,
        title=f"and {more} more" if more > 0 else None,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        shown = printable(name)
        text.set_parse_math(False)
        text.set_text(shown if len(shown) <= NAME_LENGTH else f"{shown[: NAME_LENGTH - 1]}…")
