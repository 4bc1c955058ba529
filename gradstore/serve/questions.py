"""Paths that ask the store: score, select, query, diff, map, and a file for PAIR's viewer."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import PlainTextResponse, Response

from gradstore.errors import BadInput
from gradstore.serve import asking
from gradstore.serve.access import NAMED, Here, Newest, Seconds, table_of
from gradstore.serve.answers import answer, check_unchanged
from gradstore.serve.forms import DiffForm, MapQuery, PairQuery, QueryForm, ScoreForm, SelectForm
from gradstore.serve.pair_viewer import viewer_line
from gradstore.serve.problems import RESPONSES
from gradstore.serve.row_map import RowMap, row_map
from gradstore.serve.rows import Table
from gradstore.serve.served import commit_of

router = APIRouter(prefix="/v1", responses=RESPONSES, dependencies=NAMED)


@router.post("/score")
def score(
    request: Request,
    served: Here,
    store: Newest,
    form: Annotated[ScoreForm, Body()],
    wait: Seconds = 10,
) -> Response:
    """Score every training row; 202 and a job where it takes longer than `wait` seconds."""
    scores = asking.scores_of(store, form, served.desk, wait)
    usable = scores.usable
    values = [float(v) if u else None for v, u in zip(scores.values, usable, strict=True)]
    good = scores.values[usable]
    content = {
        "commit": commit_of(store),
        "generation": scores.train.name,
        "targets": [each.name for each in scores.targets],
        "rows": scores.train.rows,
        "usable_rows": int(usable.sum()),
        "skipped": scores.skipped,
        "quartiles": np.quantile(good.astype(np.float64), [0, 0.25, 0.5, 0.75, 1]).tolist(),
        "histogram": asking.histogram(scores, form.bins),
        **({"scores": values} if form.values else {}),
    }
    columns = {"row": np.arange(len(values)), "score": scores.values, "usable": usable,
               "best_subtask": scores.best_subtask}  # fmt: skip
    return answer(request, store, content, columns)


@router.post("/select")
def select(
    request: Request,
    served: Here,
    store: Newest,
    form: Annotated[SelectForm, Body()],
    wait: Seconds = 10,
) -> Response:
    """Choose rows by a rule, within quotas and a budget of rows, of a share, or of tokens."""
    asking.check(store, form)
    scores = asking.scores_of(store, form, served.desk, wait)
    picked = asking.chosen(store, scores, form, served.desk, wait)
    table = Table(store, scores.train, served.desk.kept, scores)
    lines = [{"rank": rank, **line}
             for rank, line in enumerate(table.lines(picked, form.characters), 1)]  # fmt: skip
    content = {
        "commit": commit_of(store),
        "generation": scores.train.name,
        "chosen": len(picked),
        "tokens": int(scores.train.tokens[picked].astype(np.int64).sum()),
        "usable_rows": int(scores.usable.sum()),
        "rows": lines,
    }
    return answer(request, store, content, lines)


@router.post("/query")
def query(
    request: Request,
    served: Here,
    store: Newest,
    form: Annotated[QueryForm, Body()],
    wait: Seconds = 10,
) -> Response:
    """Show the training rows that helped one target row and those that hurt it."""
    scores = asking.scores_of(store, form.question(), served.desk, wait)
    table = Table(store, scores.train, served.desk.kept, scores)
    helped, hurt = asking.sides(scores, form.top)
    target = Table(store, scores.targets[0], served.desk.kept)
    sides = {"helped": table.lines(helped, form.characters),
             "hurt": table.lines(hurt, form.characters)}  # fmt: skip
    content = {
        "commit": commit_of(store),
        "generation": scores.train.name,
        "target": scores.targets[0].name,
        "target_row": target.lines([form.target_row], form.characters)[0],
        "usable_rows": int(scores.usable.sum()),
        "skipped": scores.skipped,
        "text": table.texts is not None,
        **sides,
    }
    lines = [{"side": side, "rank": rank, **line}
             for side, found in sides.items() for rank, line in enumerate(found, 1)]  # fmt: skip
    return answer(request, store, content, lines)


@router.post("/diff")
def diff(
    request: Request,
    served: Here,
    store: Newest,
    form: Annotated[DiffForm, Body()],
    wait: Seconds = 10,
) -> Response:
    """Compare two selections: which rows entered, which left."""
    tables, sets = [], []
    for budget in (form.before, form.after):
        asking.check(store, budget)
        scores = asking.scores_of(store, budget, served.desk, wait)
        tables.append(Table(store, scores.train, served.desk.kept, scores))
        sets.append(asking.chosen(store, scores, budget, served.desk, wait))
    if not np.array_equal(tables[0].generation.row_hash, tables[1].generation.row_hash):
        raise BadInput("before and after are selections of different training rows; compare "
                       "generations of the same rows.")  # fmt: skip
    before, after = set(sets[0]), set(sets[1])
    entered = [each for each in sets[1] if each not in before]
    left = [each for each in sets[0] if each not in after]
    content: dict[str, Any] = {
        "commit": commit_of(store),
        "before": _selected(tables[0], sets[0]),
        "after": _selected(tables[1], sets[1]),
        "kept": len(sets[0]) - len(left),
        "entered_rows": len(entered),
        "left_rows": len(left),
        "entered": tables[1].lines(entered[: form.top], form.characters),
        "left": tables[0].lines(left[: form.top], form.characters),
    }
    lines = [{"side": side, **line} for side in ("entered", "left") for line in content[side]]
    return answer(request, store, content, lines)


def _selected(table: Table, picked: list[int]) -> dict[str, Any]:
    counts = np.bincount(table.sources.code[picked] + 1, minlength=len(table.sources.names) + 1)
    names = ("", *table.sources.names)
    return {"generation": table.generation.name, "rows": len(picked),
            "sources": {n: int(c) for n, c in zip(names, counts, strict=True) if c}}  # fmt: skip


@router.get("/pair.jsonl", response_class=PlainTextResponse)
def pair(
    request: Request, served: Here, store: Newest, wanted: Annotated[PairQuery, Query()]
) -> Response:
    """Write target rows with their helpers and hurters for PAIR's viewer (pretraining-tda)."""
    check_unchanged(request, store)
    lines = []
    for target_row in wanted.row:
        form = QueryForm(target_row=target_row, **wanted.model_dump(exclude={"row", "wait"}))
        scores = asking.scores_of(store, form.question(), served.desk, wanted.wait)
        table = Table(store, scores.train, served.desk.kept, scores)
        sides = [table.lines(rows, form.characters) for rows in asking.sides(scores, form.top)]
        target = scores.targets[0]
        asked = Table(store, target, served.desk.kept).lines([target_row], form.characters)[0]
        lines.append(viewer_line(target.set, asked, *sides))
    headers = {"ETag": f'"{commit_of(store)}"', "Vary": "Accept",
               "Content-Disposition": 'attachment; filename="influence.jsonl"'}  # fmt: skip
    return Response("".join(lines), media_type="application/x-ndjson", headers=headers)


@router.get("/map")
def map_of_rows(
    request: Request, served: Here, store: Newest, wanted: Annotated[MapQuery, Query()]
) -> Response:
    """Place the training rows on the two principal directions of their gradients."""
    check_unchanged(request, store)
    table = table_of(served, store, wanted, wanted.wait, scored=wanted.scored)
    generation = table.generation
    found: RowMap = served.desk.ask(
        ("map", generation.commit_sha), "map", generation.rows,
        lambda on_rows: row_map(generation, on_rows), wanted.wait,
    )  # fmt: skip
    rows = np.flatnonzero(~np.isnan(found.points[:, 0]))
    if len(rows) > wanted.points:
        rows = rows[np.linspace(0, len(rows) - 1, wanted.points).astype(np.int64)]
    columns: dict[str, Any] = {
        "row": rows,
        "x": found.points[rows, 0],
        "y": found.points[rows, 1],
        "source": table.sources.code[rows],
    }
    if table.scores is not None:
        columns["score"] = table.scores.values[rows]
    content = {
        "commit": commit_of(store),
        "generation": generation.name,
        "explained": found.explained,
        "sampled": found.sampled,
        "usable_rows": int(np.count_nonzero(~np.isnan(found.points[:, 0]))),
        "sources": list(table.sources.names),
        **{name: _short(column) for name, column in columns.items()},
    }
    return answer(request, store, content, columns)


def _short(column: Any) -> list[Any]:  # noqa: ANN401 - a numeric array
    """Return numbers for JSON: floats to 6 digits, nan as null."""
    if column.dtype.kind == "i":
        return list(column.tolist())
    return [None if np.isnan(v) else float(f"{v:.6g}") for v in column.tolist()]
