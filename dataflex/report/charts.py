"""Charts of a page as inline SVG: coloured by its style sheet, said in words, with their numbers.

Sizes are units of the drawing, which is scaled to the width there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from gradstore.format.names import printable

FloatArray = npt.NDArray[np.float64]

#: Classes of colours that the style sheet has, and the one for all the rest.
COLOURS, REST = 7, 7

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 480, 60, 16, 12, 40

#: Height of a plot without its axis, of a bar with its gap, and of a square of a heat map at most.
PLOT, BAR, SQUARE = 170, 24, 34

#: Characters of a name beside a bar; the table has all of it.
NAME = 14

#: Columns of a table of names, and points of a line, at most.
LISTED, POINTS = 30, 400


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: its name.
        told: the chart in a sentence, for who does not see it.
        svg: the drawing.
        legend: (number of the colour, name) of what is drawn.
        header: names of the columns of its table.
        rows: the cells of its table.
    """

    title: str
    told: str
    svg: Markup
    legend: Sequence[tuple[int, str]]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: float | None) -> str:
    """Write a number for people.

    >>> number(12345), number(0.123456), number(12.0), number(None), number(float("nan"))
    ('12,345', '0.1235', '12', '-', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(value: float) -> str:
    """Write a share as percent.

    >>> share(0.1234), share(0.0004), share(1.0)
    ('12%', '0.04%', '100%')
    """
    return f"{100 * value:.0f}%" if value == 0 or value >= 0.01 else f"{100 * value:.2g}%"


def stacked(
    title: str, told: str, bars: Sequence[tuple[str, Mapping[str, float]]], names: Sequence[str]
) -> Chart:
    """Draw a bar per entry, parted by the shares of its counts; of many names the largest."""
    table = np.array([[float(counts.get(name, 0.0)) for name in names] for _, counts in bars])
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1e-300)
    largest = np.sort(np.argsort(-shares.sum(axis=0), kind="stable")[:COLOURS])
    shown = [names[i] for i in largest]
    parts = shares[:, largest]
    if len(names) > COLOURS:
        parts = np.hstack([parts, 1 - parts.sum(axis=1, keepdims=True)])
        shown.append(f"{len(names) - COLOURS} others")
    left, span = 100, WIDTH - 100 - RIGHT
    drawn = []
    for i, (label, _) in enumerate(bars):
        y = TOP + i * BAR
        drawn.append(_text(left - 8, y + 14, _cut(label), "end"))
        at = float(left)
        for colour, part in enumerate(parts[i]):
            if part > 0:
                drawn.append(
                    f'<rect class="f{colour} part" x="{at:.1f}" y="{y}" width="{span * part:.1f}" '
                    f'height="{BAR - 5}"><title>{_safe(shown[colour])}: {share(part)}</title>'
                    "</rect>"
                )
            at += span * part
    base = TOP + len(bars) * BAR
    for tick in (0, 0.25, 0.5, 0.75, 1):
        drawn.append(_text(left + span * tick, base + 12, share(tick)))
    listed = np.sort(np.argsort(-shares.sum(axis=0), kind="stable")[:LISTED])
    rows = [
        [label, *(f"{number(table[i, j])} ({share(shares[i, j])})" for j in listed)]
        for i, (label, _) in enumerate(bars)
    ]
    return Chart(title, told, _svg(title, told, base + 20, drawn), list(enumerate(shown)),
                 ["", *(names[j] for j in listed)], rows)  # fmt: skip


def histogram(title: str, told: str, spread: Mapping[str, Any]) -> Chart:
    """Draw how many rows have which score: all usable ones, the chosen in front, and the cut."""
    counts = np.asarray(spread["counts"]).reshape(-1, 2).sum(axis=1)
    chosen = np.asarray(spread["chosen"]).reshape(-1, 2).sum(axis=1)
    low, high = float(spread["low"]), float(spread["high"])
    high = high if high > low else low + 1.0
    edges = np.linspace(low, high, len(counts) + 1)
    plot = _Plot((low, high), (0.0, float(max(counts.max(), 1))))
    drawn = plot.axes("score", "rows")
    for layer, colour in ((counts, REST), (chosen, 0)):
        for i, count in enumerate(layer):
            if count:
                x, y = plot.x(edges[i]), plot.y(count)
                drawn.append(
                    f'<rect class="f{colour}" x="{x + 0.5:.1f}" y="{y:.1f}" '
                    f'width="{max(plot.x(edges[i + 1]) - x - 1, 0.5):.1f}" '
                    f'height="{TOP + PLOT - y:.1f}"/>'
                )
    if spread.get("cut") is not None:
        x = plot.x(float(spread["cut"]))
        drawn.append(f'<line class="cut" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + PLOT}"/>')
        side, anchor = (-5, "end") if x > WIDTH / 2 else (5, "start")
        drawn.append(_text(x + side, TOP + 12, f"cut {number(spread['cut'])}", anchor))
    rows = [
        [f"{number(edges[i])} to {number(edges[i + 1])}", number(counts[i]), number(chosen[i])]
        for i in range(len(counts))
    ]
    return Chart(title, told, _svg(title, told, plot.height, drawn),
                 [(REST, "usable, not chosen"), (0, "chosen")],
                 ["score", "usable rows", "chosen rows"], rows)  # fmt: skip


def lines(
    title: str,
    told: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    marks: Sequence[float] = (),
) -> Chart:
    """Draw points (x, y) of each name as a line; x are whole numbers, `marks` are dotted."""
    shown = dict(list(series.items())[:COLOURS])
    points = [(x, y) for each in shown.values() for x, y in each if math.isfinite(y)]
    xs, ys = zip(*points, strict=True) if points else ((0.0,), (0.0,))
    low, high = min(*ys, 0.0) if min(ys) < 0.7 * max(ys) else min(ys), max(ys)
    plot = _Plot((min(xs), max(xs)), (low, high))
    drawn = plot.axes(*labels, whole=True)
    for x in marks:
        if min(xs) <= x <= max(xs):
            drawn.append(f'<line class="mark" x1="{plot.x(x):.1f}" x2="{plot.x(x):.1f}" y1="{TOP}" '
                         f'y2="{TOP + PLOT}"/>')  # fmt: skip
    for colour, each in enumerate(shown.values()):
        thinned = _thinned([(x, y) for x, y in each if math.isfinite(y)])
        path = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in thinned)
        drawn.append(f'<polyline class="l{colour}" points="{path}"/>')
        if len(each) < 30:
            drawn += [f'<circle class="f{colour}" cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="3"/>'
                      for x, y in thinned]  # fmt: skip
    by_x: dict[float, list[str]] = {}
    listed = dict(list(series.items())[:LISTED])
    for i, each in enumerate(listed.values()):
        for x, y in _thinned(each, POINTS if len(listed) < 5 else POINTS // 8):
            by_x.setdefault(x, ["-"] * len(listed))[i] = number(y)
    rows = [[number(x), *values] for x, values in sorted(by_x.items())]
    legend = list(enumerate(shown)) if len(series) > 1 else []
    if len(series) > COLOURS:
        legend.append((REST, f"{len(series) - COLOURS} more in the table"))
    return Chart(title, told, _svg(title, told, plot.height, drawn), legend,
                 [labels[0], *listed], rows)  # fmt: skip


def heat(title: str, told: str, labels: Sequence[str], table: FloatArray) -> Chart:
    """Draw shares (n, n) as squares, darker where larger; each says its number if there is room."""
    n, left = len(labels), 100
    size = min(SQUARE, (WIDTH - left - RIGHT) / n)
    drawn = []
    for i in range(n):
        drawn.append(_text(left - 8, TOP + (i + 0.5) * size + 4, _cut(labels[i]), "end"))
        for j in range(n):
            x, y, value = left + j * size, TOP + i * size, float(table[i, j])
            level = round(10 * value)
            drawn.append(
                f'<rect class="h{level}" x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" '
                f'height="{size - 1:.1f}"><title>{_safe(labels[i])}, {_safe(labels[j])}: '
                f"{share(value)}</title></rect>"
            )
            if size >= 30:
                ink = "on" if level > 5 else "off"
                drawn.append(_text(x + size / 2, y + size / 2 + 4, f"{100 * value:.0f}", name=ink))
    rows = [[labels[i], *(share(float(value)) for value in table[i])] for i in range(n)]
    return Chart(title, told, _svg(title, told, TOP + n * size + 6, drawn), [],
                 ["", *labels], rows)  # fmt: skip


# -- parts ----------------------------------------------------------------------------------------


class _Plot:
    """A plane of two linear axes."""

    height = TOP + PLOT + BOTTOM

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self._x, self._y = _wide(*x), _wide(*y)

    def x(self, value: float) -> float:
        """Place a value across."""
        low, high = self._x
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Place a value upwards."""
        low, high = self._y
        return TOP + PLOT * (1 - (value - low) / (high - low))

    def axes(self, across: str, up: str, *, whole: bool = False) -> list[str]:
        """Draw lines and numbers of both axes, and their names."""
        drawn = []
        for value in _ticks(*self._y, 4):
            y = self.y(value)
            drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
                         f'y2="{y:.1f}"/>')  # fmt: skip
            drawn.append(_text(LEFT - 6, y + 4, number(value), "end"))
        for value in _ticks(*self._x, 5, whole=whole):
            drawn.append(_text(self.x(value), TOP + PLOT + 16, number(value)))
        drawn.append(_text((LEFT + WIDTH) / 2, TOP + PLOT + 34, across, name="name"))
        drawn.append(f'<text class="name" transform="translate(12 {TOP + PLOT / 2}) rotate(-90)" '
                     f'text-anchor="middle">{_safe(up)}</text>')  # fmt: skip
        return drawn


def _wide(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Choose up to about `most` round numbers between two ends.

    >>> _ticks(0, 40, 4), _ticks(3, 5, 6, whole=True)
    ([0.0, 10.0, 20.0, 30.0, 40.0], [3.0, 4.0, 5.0])
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _thinned(
    points: Sequence[tuple[float, float]], most: int = POINTS
) -> list[tuple[float, float]]:
    if len(points) <= most:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, most).round().astype(int)]


def _svg(title: str, told: str, height: float, drawn: Sequence[str]) -> Markup:
    """Wrap a drawing; everything in it is escaped by now."""
    opening = (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{_safe(f"{title}. {told}")}">'
    )
    return Markup(opening + "".join(drawn) + "</svg>")


def _text(x: float, y: float, text: str, anchor: str = "middle", name: str = "") -> str:
    styled = f' class="{name}"' if name else ""
    return f'<text{styled} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(text)}</text>'


def _cut(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def _safe(text: str) -> str:
    """Escape a text for a page; control characters are spelled out, XML has none of them."""
    return str(escape(printable(text)))
