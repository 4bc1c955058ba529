"""The sections of a report: each says in words, charts and tables what a run's records tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.report import charts
from dataflex.report.charts import Chart, number, share
from dataflex.report.records import FloatArray, Records

#: Updates that a chart has a part of its own for, those with a histogram, and those with text.
MOST_UPDATES, MOST_HISTOGRAMS, MOST_READ = 24, 6, 6

#: Rows that are shown of the best and of the worst.
ROWS = 5

#: Seconds of an event's parts, and their names.
PARTS = {"export_seconds": "passes over the rows", "score_seconds": "scores",
         "select_seconds": "choice"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table: its caption, the names of its columns, its cells."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ReadRow:
    """A row to be read: `place` and `score` before its text."""

    place: str
    score: str
    source: str
    prompt: str | None
    response: str | None


@dataclass(frozen=True)
class Group:
    """Rows under a heading of their own."""

    title: str
    rows: Sequence[ReadRow]


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        says: sentences that explain it.
        charts: in their order.
        tables: below the charts.
        groups: rows with text.
    """

    name: str
    title: str
    says: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    groups: Sequence[Group] = ()


def sections_of(run: Records) -> list[Section]:
    """List the sections that a run's records fill, in their order."""
    made = (chosen(run), scores(run), rows(run), overlap(run), mixture(run), losses(run),
            skipped(run), cost(run))  # fmt: skip
    return [each for each in made if each.charts or each.tables or each.groups]


def chosen(run: Records) -> Section:
    """Tell which data sets and kinds the chosen rows are of, beside all rows."""
    told = [e for e in run.events if e.get("chosen")]
    drawn = []
    if told and len(run.sets) > 1:
        bars = [(f"step {e['step']}", e["chosen"]) for e in _even(told)]
        if pool := told[-1].get("train_sets"):
            bars = [("all rows", pool), *bars]
        drawn.append(charts.stacked("Chosen rows by data set", _shift(bars), bars, run.sets))
    if with_kinds := [each for each in run.chosen if each.kinds]:
        last = with_kinds[-1].kinds
        pool = last["all"]
        bars = [(f"step {e.step}", e.kinds["chosen"]) for e in _even(with_kinds)]
        bars = [("all rows", pool), *bars]
        title = f"Chosen rows by {last['column']}"
        drawn.append(charts.stacked(title, _shift(bars), bars, list(pool)))
    found = [
        [number(each.step), number(len(each.rows)), number(len(np.unique(each.rows))),
         *([", ".join(f"{n} {c:,}" for n, c in by.items())] if any(_won(run)) else [])]
        for each, by in zip(run.chosen, _won(run), strict=True)
    ]  # fmt: skip
    header = ["optimizer step", "rows", "different rows", *(["won by"] if any(_won(run)) else [])]
    tables = [Table("Rows chosen at each update", header, found)] if found else []
    says = []
    if run.chosen:
        ever = len(np.unique(np.concatenate([each.rows for each in run.chosen])))
        says.append(
            f"{number(ever)} of {number(run.train_rows)} training rows "
            f"({share(ever / run.train_rows)}) were chosen at least once."
        )
    return Section("chosen", "What was chosen", says, drawn, tables)


def scores(run: Records) -> Section:
    """Show the scores of all usable rows, and where the selection was cut."""
    told = _even([each for each in run.chosen if each.spread], MOST_HISTOGRAMS)
    drawn = []
    for each in told:
        usable, cut = int(np.sum(each.spread["counts"])), each.spread["cut"]
        said = (
            f"{number(usable)} usable rows with scores from {number(each.spread['low'])} to "
            f"{number(each.spread['high'])}; {number(int(np.sum(each.spread['chosen'])))} chosen"
        )
        said += "." if cut is None else f", all those from {number(cut)} upwards."
        drawn.append(charts.histogram(f"Scores at step {each.step}", said, each.spread))
    scored = [each for each in run.chosen if each.has_scores]
    ranges = {
        "largest": [(each.step, float(np.nanmax(each.scores))) for each in scored],
        "mean": [(each.step, float(np.nanmean(each.scores))) for each in scored],
        "smallest": [(each.step, float(np.nanmin(each.scores))) for each in scored],
    }
    if len(scored) > 1:
        said = _sentence({"the mean": ranges["mean"]})
        drawn.append(charts.lines("Scores of the chosen rows", said, ranges,
                                  ("optimizer step", "score")))  # fmt: skip
    says = []
    if any(each.spread["cut"] is not None for each in told):
        says.append("The rows with the largest scores were chosen, down to the cut.")
    if any(each.spread["cut"] is None for each in told):
        says.append("Without a cut, rows were drawn, or limited by more than their scores.")
    return Section("scores", "Scores and the cut", says, drawn)


def rows(run: Records) -> Section:
    """Show the chosen rows with the best scores, and the usable rows with the lowest."""
    groups = []
    for each in _even(run.chosen, MOST_READ)[::-1]:
        order = np.arange(min(ROWS, len(each.rows)))
        if each.has_scores:
            order = np.argsort(-np.nan_to_num(each.scores, nan=-np.inf), kind="stable")[:ROWS]
        best = run.lines(each.step, order.tolist())
        what = "highest scores of chosen rows" if each.has_scores else "first chosen rows"
        if best:
            groups.append(Group(f"Step {each.step}: {what}", [_read_row(line) for line in best]))
        if lowest := run.lowest(each.step)[:ROWS]:
            title = f"Step {each.step}: lowest scores of usable rows"
            groups.append(Group(title, [_read_row(line) for line in lowest]))
    says = ["Every chosen row is in selections/step_<g>.jsonl beside this page."]
    if any(row.prompt is None for group in groups for row in group.rows):
        says.append("Text was not kept: train with store_text: true to read the rows here.")
    return Section("rows", "Rows with the highest and the lowest scores", says, groups=groups)


def overlap(run: Records) -> Section:
    """Compare the selections of different updates."""
    found = _even(run.chosen)
    if len(found) < 2:
        return Section("overlap", "")
    table, sizes = _shared([each.rows for each in found], run.train_rows)
    labels = [f"step {each.step}" for each in found]
    successive = [float(table[i, i - 1]) for i in range(1, len(found))]
    said = (
        f"From one shown update to the next, {share(min(successive))} to {share(max(successive))} "
        "of the rows had been chosen before."
    )
    by_chance = float(sizes.mean()) / run.train_rows
    says = [
        "A square says which share of its line's rows its column's update chose, too, in percent. "
        f"Drawn at random it would be {share(by_chance)}."
    ]
    chart = charts.heat("Rows that two updates share", said, labels, table)
    return Section("overlap", "Overlap of the selections", says, [chart])


def mixture(run: Records) -> Section:
    """Show proportions of domains, and weights of domains and of samples, over the steps."""
    drawn = []
    mixed = [e for e in run.events if e.get("proportions")]
    names = list(run.names("proportions"))
    if len(names) > 1:
        bars = [(f"step {e['step']}", e["proportions"]) for e in _even(mixed)]
        drawn.append(charts.stacked("Proportions of the domains", _shift(bars), bars, names))
    for key, what in (("weights", "Weights of the domains"), ("kept", "Rows kept by each stage")):
        series = {name: [(int(e["step"]), float(e[key][name])) for e in run.events
                         if name in (e.get(key) or {})] for name in run.names(key)}  # fmt: skip
        if series:
            drawn.append(charts.lines(what, _sentence(series),
                                      series, ("optimizer step", key)))  # fmt: skip
    of_samples = (("largest", "max"), ("mean", "mean"), ("smallest", "min"))
    ends = {name: run.numbers(f"weight_{key}") for name, key in of_samples}
    if ends["mean"]:
        said = _sentence({f"the {name}": points for name, points in ends.items()})
        drawn.append(charts.lines("Weights of the samples", said, ends,
                                  ("optimizer step", "weight")))  # fmt: skip
    return Section("mixture", "Mixture and weights", charts=drawn)


def losses(run: Records) -> Section:
    """Show the losses of training and of evaluations."""
    series = {"training": run.losses} if run.losses else {}
    series |= {f"evaluation {name}".strip(): p for name, p in run.evaluated.items() if p}
    if not series:
        return Section("losses", "")
    said = _sentence({f"the loss of {name}": points for name, points in series.items()})
    marks = run.updates if len(run.updates) <= MOST_UPDATES else ()
    chart = charts.lines("Loss over the run", said, series, ("optimizer step", "loss"), marks)
    says = ["Dotted lines are updates."] if marks else []
    return Section("losses", "Training and evaluation loss", says, [chart])


def skipped(run: Records) -> Section:
    """List rows that could not be used, by reason."""
    by_reason: dict[str, list[tuple[int, int]]] = {}
    for event in run.events:
        for reason, count in (event.get("skipped") or {}).items():
            if count:
                by_reason.setdefault(str(reason), []).append((int(event["step"]), int(count)))
    dropped = (run.receipt.get("rows") or {}).get("dropped") or {}
    found = [[reason, number(count), "while the data were read"]
             for reason, count in dropped.items() if count]  # fmt: skip
    for reason, counts in by_reason.items():
        if reason not in dropped:
            steps = ", ".join(str(step) for step, _ in counts[:10])
            found.append([reason, number(max(count for _, count in counts)), f"at step {steps}"
                          + (" and later" if len(counts) > 10 else "")])  # fmt: skip
    table = Table("Rows left out, and why", ["reason", "rows", "where"], found)
    return Section("skipped", "Skipped and dropped rows", tables=[table] if found else [])


def cost(run: Records) -> Section:
    """Compare the time of the updates with that of training."""
    timed = [e for e in run.events if "pause_seconds" in e]
    if not timed:
        return Section("cost", "")
    pause = sum(float(e["pause_seconds"]) for e in timed)
    took = f"{pause:,.1f} s" if pause >= 0.1 else "less than 0.1 s"
    says = [f"{number(len(timed))} updates took {took} in all."]
    wall = wall_seconds(run)
    if wall is None:
        says.append("How long the run took is not known: one of its sessions was killed.")
    elif wall > 0:
        part = share(min(1.0, pause / wall)) if pause >= 0.001 * wall else "less than 0.1%"
        says.append(f"That is {part} of the {wall:,.1f} s of the run.")
    series = {"whole pause": [(int(e["step"]), float(e["pause_seconds"])) for e in timed]}
    for key, name in PARTS.items():
        points = [(int(e["step"]), float(e[key])) for e in timed if e.get(key)]
        if points:
            series[name] = points
    tokens = [int(e.get("tokens") or 0) for e in timed]
    if any(tokens):
        says.append(f"Their passes read {number(sum(tokens))} tokens.")
    said = _sentence({"the whole pause": series["whole pause"]})
    chart = charts.lines("Seconds of each update", said,
                         series, ("optimizer step", "seconds"))  # fmt: skip
    return Section("cost", "Cost of asking", says, [chart])


def wall_seconds(run: Records) -> float | None:
    """Add up the seconds of the run's sessions; None where one did not end, 0 without a receipt."""
    seconds = [session.get("seconds") for session in run.receipt.get("sessions") or ()]
    return None if None in seconds else float(sum(seconds))


# -- parts ----------------------------------------------------------------------------------------


def _won(run: Records) -> list[Mapping[str, int]]:
    """Return, for each update, the chosen rows by the target that each helps most."""
    by_step = {int(e["step"]): e.get("won") or {} for e in run.events if e.get("chosen")}
    return [by_step.get(each.step, {}) for each in run.chosen]


def _shared(
    selections: Sequence[npt.NDArray[np.int64]], n: int
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Count what selections share: (u, u) shares of a line's rows, (u,) different rows of each."""
    masks = []
    for rows in selections:
        mask = np.zeros(n, dtype=np.bool_)
        mask[rows] = True
        masks.append(np.packbits(mask))
    both = np.array([[int(np.bitwise_count(a & b).sum()) for b in masks] for a in masks])
    sizes = np.diagonal(both)
    return both / sizes[:, None], sizes


def _even(found: Sequence[Any], most: int = MOST_UPDATES) -> list[Any]:
    """Take up to `most` entries evenly, the first and the last among them."""
    places = np.linspace(0, len(found) - 1, min(len(found), most)).round().astype(int)
    return [found[i] for i in np.unique(places)]


def _shift(bars: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Say the largest share of the last bar, beside its share of the first."""
    (first, before), (last, after) = bars[0], bars[-1]
    name = max(after, key=lambda each: after[each])
    part = [by.get(name, 0) / max(sum(by.values()), 1e-300) for by in (before, after)]
    return f"{name} is {share(part[1])} of {last}; of {first} it is {share(part[0])}."


def _sentence(series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Say where the first few lines begin and end."""
    said = "; ".join(_ends(name, points) for name, points in list(series.items())[:4])
    return f"T{said[1:]}." if said.startswith("the ") else f"{said}."


def _ends(name: str, points: Sequence[tuple[int, float]]) -> str:
    (start, first), (stop, last) = points[0], points[-1]
    if start == stop:
        return f"{name} is {number(first)} at step {start}"
    return f"{name} goes from {number(first)} at step {start} to {number(last)} at step {stop}"


def _read_row(line: Mapping[str, Any]) -> ReadRow:
    source = line.get("source")
    named = f"row {line['row']}" if not source else f"{source[0]}, row {source[1]}"
    return ReadRow(f"{line['rank']}", number(line.get("score")), named,
                   line.get("prompt"), line.get("response"))  # fmt: skip
