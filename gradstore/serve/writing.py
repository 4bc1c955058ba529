"""Paths that change a store: a file, a removal, a copy; each asks for the key that writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from gradstore.serve.intake import Intake, Limits, digest_of, length_of
from gradstore.serve.keeping import CHANGES_AT_ONCE, Keeping, tag_of
from gradstore.serve.problems import RESPONSES, Refusal
from gradstore.storage.wire import COPIES, FILES, REMOVALS, WRITE_KEY, WRITER

T = TypeVar("T")

#: What OpenAPI says of these paths beside the rest.
_RESPONSES: dict[int | str, dict[str, Any]] = {
    **RESPONSES,
    **{
        code: {**RESPONSES[409], "description": text}
        for code, text in {
            400: "The body is not that of its Content-Digest, or of its length.",
            403: "The key may only read.",
            408: "The body came too slowly.",
            409: "Something must come before it, or it differs from what is stored.",
            411: "The body has no Content-Length.",
            412: "The file's name is taken by other bytes, or its ETag is another.",
            413: "The body is larger than the server takes.",
            422: "No file of a store, or not what its path says.",
            428: "The path needs If-None-Match: * or If-Match.",
            429: "Too many writes at once; send it again after the seconds of Retry-After.",
            507: "The disk is full.",
        }.items()
    },
}


@dataclass
class Writing:
    """Whatever an app needs to take writes.

    Attributes:
        key: that writes.
        keeping: makes the changes.
        intake: receives bodies.
        threads: in which changes are made.
    """

    key: str
    keeping: Keeping
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.intake = Intake(self.limits)
        self.threads = ThreadPoolExecutor(CHANGES_AT_ONCE, "change")

    def close(self) -> None:
        """Finish what was begun, and let the store go."""
        self.threads.shutdown()
        self.keeping.close()

    async def done(self, act: Callable[[], T]) -> T:
        """Return what a change gives, made in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, act)


class Removal(BaseModel):
    """Files to be removed."""

    paths: list[str] = Field(max_length=1000, description="Of files; a missing one is no error.")


class Copy(BaseModel):
    """A file to be copied into staging."""

    source: str = Field(description="Path of the file.")
    target: str = Field(description="Path in staging, which no file has.")


def writing_of(request: Request) -> Writing:
    """Return what takes this app's writes.

    Raises:
        Refusal: the request shows no key that writes.
    """
    if not request.state.may_write:
        raise Refusal(403, "read-key", "this key may only read. Send the one that writes, which "
                      f"`gradstore serve --writable` printed or was given as {WRITE_KEY}, in the "
                      "header Authorization: Bearer KEY", exit_code=5)  # fmt: skip
    found: Writing = request.app.state.writing
    return found


Allowed = Annotated[Writing, Depends(writing_of)]

router = APIRouter(responses=_RESPONSES)


@router.put(f"{FILES}/{{path:path}}", openapi_extra={"requestBody": {
    "required": True, "content": {"application/octet-stream": {"schema": {
        "type": "string", "format": "binary"}}}}})  # fmt: skip
async def put(request: Request, writing: Allowed, path: str) -> Response:
    """Write one file of the store, durably; 201 where it is new, 200 where it was there.

    Content-Digest is needed, and If-None-Match: * for whatever never changes.
    """
    intake = writing.intake
    try:
        size = length_of(request, intake.limits.body_bytes)
        digest_of(request)
        with intake.admitted(size):
            data = await intake.received(request, size)
            given = request.headers
            new = await writing.done(lambda: writing.keeping.put(
                path, data, given.get("if-match"), given.get("if-none-match"),
                given.get(WRITER, ""),
            ))  # fmt: skip
    except Refusal:
        await intake.passed_over(request)
        raise
    return Response(status_code=201 if new else 200, headers={"ETag": tag_of(data)})


@router.post(REMOVALS)
async def remove(request: Request, writing: Allowed, form: Annotated[Removal, Body()]) -> Response:
    """Remove files that nothing committed needs; all of them, or none."""
    writer = request.headers.get(WRITER, "")
    await writing.done(lambda: writing.keeping.remove(form.paths, writer))
    return Response(status_code=200)


@router.post(COPIES)
async def copy(writing: Allowed, form: Annotated[Copy, Body()]) -> Response:
    """Copy a file into staging, as what is set aside."""
    await writing.done(lambda: writing.keeping.copy(form.source, form.target))
    return Response(status_code=200)
