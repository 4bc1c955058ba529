"""Paths that look into the store: stores, generations, rows, jobs."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from gradstore.serve.access import NAMED, Here, Newest, table_of
from gradstore.serve.answers import answer, check_unchanged, running
from gradstore.serve.forms import Position, Question, RowsQuery
from gradstore.serve.problems import RESPONSES
from gradstore.serve.rows import NO_TEXT, check_rows
from gradstore.serve.served import commit_of, generation_lines

router = APIRouter(prefix="/v1", responses=RESPONSES, dependencies=NAMED)


@router.get("/stores")
def stores(request: Request, served: Here, store: Newest) -> Response:
    """List the one store that is served."""
    check_unchanged(request, store)
    line = {
        "name": "/".join(store.path.parts[-2:]),
        "path": str(store.path),
        "uuid": store.uuid,
        "schema_version": store.schema_version,
        "commit": commit_of(store),
        "commits": len(store.commits),
        "spaces": store.spaces(),
        "explains": served.explainer is not None,
    }
    return answer(request, store, {"stores": [line]})


@router.get("/generations")
def generations(request: Request, store: Newest) -> Response:
    """List the committed generations, newest last."""
    check_unchanged(request, store)
    opened = store.generations()
    lines = generation_lines(opened)
    for line, generation in zip(lines, opened, strict=True):
        line["text"] = store.texts(generation) is not None
    content = {"commit": commit_of(store), "generations": lines, "without_text": NO_TEXT}
    return answer(request, store, content)


@router.get("/rows")
def rows(
    request: Request, served: Here, store: Newest, wanted: Annotated[RowsQuery, Query()]
) -> Response:
    """Show a page of a generation's rows: text, source, status and, if asked for, score."""
    check_unchanged(request, store)
    table = table_of(
        served, store, wanted, wanted.wait, name=wanted.generation, scored=wanted.asks_scores
    )
    matching = table.rows(wanted)
    page = matching[wanted.offset : wanted.offset + wanted.limit].tolist()
    lines = table.lines(page, wanted.characters)
    content = {
        "commit": commit_of(store),
        "generation": table.generation.name,
        "total": table.generation.rows,
        "matched": len(matching),
        "offset": wanted.offset,
        "sources": list(table.sources.names),
        "text": table.texts is not None,
        "rows": lines,
    }
    return answer(request, store, content, lines)


@router.get("/rows/{row}")
def row(
    request: Request,
    served: Here,
    store: Newest,
    row: Position,
    generation: str = "",
    run: str = "",
) -> Response:
    """Show one row with all of its text."""
    check_unchanged(request, store)
    table = table_of(served, store, Question(run=run), 0, name=generation, scored=False)
    check_rows(table.generation, [row])
    (line,) = table.lines([row], 2**53)
    digest = bytes(table.generation.row_hash[row]).hex()
    norm = float(table.generation.norm[row])
    content = {"commit": commit_of(store), "generation": table.generation.name, **line,
               "norm": norm if np.isfinite(norm) else None, "row_hash": digest}  # fmt: skip
    return answer(request, store, content, [line])


@router.get("/jobs")
def jobs(served: Here) -> dict[str, Any]:
    """List the last jobs, newest first."""
    return {"jobs": [each.describe() for each in served.desk.jobs()]}


@router.get("/jobs/{job}")
def job(served: Here, job: str) -> dict[str, Any]:
    """Show how far a job is."""
    return served.desk.job(job).describe()


@router.delete("/jobs/{job}", status_code=202)
def cancel(served: Here, job: str) -> Response:
    """Give a job up; it is cancelled once nobody else waits for it."""
    return running(served.desk.cancel(job))
