"""Answers: JSON or Arrow as the client accepts, with the commit as ETag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from gradstore.serve.jobs import Job, StillRunning
from gradstore.serve.served import commit_of
from gradstore.store.reader import Store

ARROW = "application/vnd.apache.arrow.stream"


class Unchanged(Exception):
    """An answer that the client has already."""

    def __init__(self, commit: str) -> None:
        super().__init__(commit)
        self.commit = commit


def check_unchanged(request: Request, store: Store) -> None:
    """Raise Unchanged if the client's copy is of this commit; only for GET."""
    commit = commit_of(store)
    known = request.headers.get("if-none-match", "")
    tags = {each.strip().removeprefix("W/") for each in known.split(",")}
    if f'"{commit}"' in tags or "*" in tags:
        raise Unchanged(commit)


def answer(
    request: Request,
    store: Store,
    content: dict[str, Any],
    table: Sequence[dict[str, Any]] | dict[str, Any] | None = None,
) -> Response:
    """Make the answer.

    Args:
        request: its Accept header chooses.
        store: whose newest commit is the ETag.
        content: what JSON shows.
        table: the rows for Arrow, as lines or as columns; None where there is no table.
    """
    headers = {"ETag": f'"{commit_of(store)}"', "Vary": "Accept"}
    if table is not None and ARROW in request.headers.get("accept", ""):
        return Response(_arrow(table), media_type=ARROW, headers=headers)
    return JSONResponse(content, headers=headers)


def _arrow(given: Sequence[dict[str, Any]] | dict[str, Any]) -> bytes:
    """Write an Arrow IPC stream; a source becomes two columns, as in `gradstore score -o`."""
    import pyarrow as pa

    if isinstance(given, dict):
        table = pa.table(given)
    else:
        lines = []
        for line in given:
            flat = dict(line)
            if "source" in flat:
                flat["source_set"], flat["source_row"] = flat.pop("source") or (None, None)
            lines.append(flat)
        table = pa.Table.from_pylist(lines)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def running(job: Job) -> Response:
    """Answer 202: the same request, sent again, waits further or gets the result."""
    headers = {"Location": f"/v1/jobs/{job.id}", "Retry-After": "1"}
    return JSONResponse(job.describe(), 202, headers=headers)


def still_running(_: Request, error: Exception) -> Response:
    """Handle StillRunning."""
    assert isinstance(error, StillRunning)
    return running(error.job)


def unchanged(_: Request, error: Exception) -> Response:
    """Handle Unchanged."""
    assert isinstance(error, Unchanged)
    return Response(status_code=304, headers={"ETag": f'"{error.commit}"', "Vary": "Accept"})
