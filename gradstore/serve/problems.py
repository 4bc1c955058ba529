"""Failures as `application/problem+json` (RFC 9457), with the messages of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from gradstore.errors import (
    BadInput,
    DamagedData,
    ProvenanceMismatch,
    StoreError,
    StoreIOError,
)
from gradstore.format.names import printable
from gradstore.storage.reading import FULL

MEDIA_TYPE = "application/problem+json"

#: What OpenAPI says of every path.
RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": {MEDIA_TYPE: {"schema": {"type": "object"}}}}
    for code, text in {
        401: "No token, or a wrong one.",
        403: "The request was made to another host name, or by another site's page.",
        404: "No such generation, row, file or job; or the store is gone.",
        409: "The store is damaged, its features can't be compared, or there is no model.",
        422: "A parameter that cannot be worked with.",
        429: "Too many scans at once; try again after the seconds of Retry-After.",
    }.items()
}


class Missing(BadInput):
    """A generation, a row or a job that there is not."""


class NoModel(BadInput):
    """A question that only the model can answer, to a server that has none."""


class TooMany(StoreError):
    """More scans wait than the server takes."""


class Cancelled(StoreError):
    """A scan that was stopped by request."""


class Refusal(StoreError):
    """A request that the server answers with a status of its own choice."""

    def __init__(
        self, status: int, title: str, detail: str, *, exit_code: int = 2, wait_seconds: int = 0
    ) -> None:
        """Say what is refused.

        Args:
            status: of HTTP.
            title: the kind, in words joined by hyphens.
            detail: what is wrong, where, and what to do next.
            exit_code: with which a command line ends.
            wait_seconds: to wait before the same request is worth a try; 0 for no such time.
        """
        super().__init__(detail)
        self.status, self.title, self.told_code = status, title, exit_code
        self.wait_seconds = wait_seconds


def out_of_order(detail: str) -> Refusal:
    """Make the refusal of what comes before what it needs."""
    return Refusal(409, "out-of-order", detail)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Tell the client of what it gave that it can't be read."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"{path} is not what its name says: {error}") from error


#: Class -> (HTTP status, kind), the most special first. The kind is the exit code's meaning.
_STATUS: tuple[tuple[type[StoreError], int, str], ...] = (
    (Missing, 404, "missing"),
    (NoModel, 409, "no-model"),
    (TooMany, 429, "too-many-scans"),
    (Cancelled, 409, "cancelled"),
    (BadInput, 422, "bad-input"),
    (ProvenanceMismatch, 409, "provenance-mismatch"),
    (DamagedData, 409, "damaged-data"),
    (StoreIOError, 503, "input-output"),
    (StoreError, 503, "store-error"),
)


def problem(
    status: int,
    title: str,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    **members: Any,  # noqa: ANN401 - further members of the document
) -> JSONResponse:
    """Make a problem document.

    Args:
        status: of HTTP.
        title: the kind, in words joined by hyphens.
        detail: one message: what is wrong, where, and what to do next.
        headers: further ones.
        members: further ones, such as `exit_code`.
    """
    content = {"type": f"urn:gradstore:{title}", "title": title.replace("-", " "), "status": status,
               "detail": printable(detail), **members}  # fmt: skip
    return JSONResponse(content, status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def of_store(error: StoreError) -> JSONResponse:
    """Make the problem of one of our errors; it carries the command line's exit code."""
    if isinstance(error, Refusal):
        wait = {"Retry-After": str(error.wait_seconds)} if error.wait_seconds else None
        return problem(error.status, error.title, str(error), headers=wait,
                       exit_code=error.told_code)  # fmt: skip
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
        return problem(507, "disk-full", str(error), exit_code=error.exit_code)
    status, title = next((code, name) for kind, code, name in _STATUS if isinstance(error, kind))
    members: dict[str, Any] = {"exit_code": error.exit_code}
    if isinstance(error, ProvenanceMismatch):
        members["differences"] = list(error.differences)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return problem(status, title, str(error), headers=headers, **members)


def install(app: FastAPI) -> None:
    """Answer every failure of an app with a problem document."""

    def store_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, StoreError)
        return of_store(error)

    def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = [(".".join(str(p) for p in e["loc"]), str(e["msg"])) for e in error.errors()]
        detail = "; ".join(f"{where}: {said}" for where, said in faults)
        return problem(422, "bad-input", f"{detail}. /v1/openapi.json lists what is taken.",
                       exit_code=BadInput.exit_code)  # fmt: skip

    def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        title = {404: "missing", 405: "method-not-allowed"}.get(error.status_code, "refused")
        return problem(error.status_code, title, f"{error.detail}. /v1/openapi.json lists the "
                       "paths and methods.", headers=error.headers)  # fmt: skip

    app.add_exception_handler(StoreError, store_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
