"""Paths that give the files of a store as they are, so that every command can read it from afar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gradstore.errors import BadInput, DamagedFile, expect
from gradstore.format.paths import check_parts, file_at
from gradstore.serve.access import Here
from gradstore.serve.keeping import Keeping, kind_of, tag_of
from gradstore.serve.problems import RESPONSES, Missing
from gradstore.serve.served import Served
from gradstore.storage.local import STAGING
from gradstore.storage.lock import LOCK
from gradstore.storage.wire import FILES, content_digest

router = APIRouter(responses=RESPONSES)

#: Bytes that are sent at a time.
_SENT_BYTES = 1 << 20

#: Endings of files, which no folder of a store has.
_ENDINGS = (".json", ".parquet", ".safetensors")


def keeping_of(request: Request) -> Keeping | None:
    """Return what makes this app's changes; None where it takes none."""
    found: Keeping | None = request.app.state.keeping
    return found


@router.get(FILES)
def listing(
    request: Request,
    served: Here,
    below: Annotated[str, Query(description="Folder of the store; none: all of it.")] = "",
    deep: Annotated[
        bool, Query(description="All files with their sizes in bytes, or the names alone.")
    ] = True,
) -> Response:
    """List the files below a folder, each with its size, or the names right below it."""
    check_parts(below)
    keeping = keeping_of(request)
    hidden = keeping.hidden if keeping is not None else frozenset()
    if below and kind_of(served.files, below) != "directory":
        return JSONResponse({"files": {}, "names": []})
    if deep:
        expect(below != "", "below", below, "a folder, or deep=false for the names at the top")
        files = {path: served.files.size(path) for path in served.files.walk(below)
                 if not _is_hidden(path, hidden)}  # fmt: skip
        return JSONResponse({"files": files})
    names = [name for name in served.files.names(below)
             if not _is_hidden(_joined(below, name), hidden)
             and _has_file(served, _joined(below, name), hidden)]  # fmt: skip
    return JSONResponse({"names": names})


@router.get(f"{FILES}/{{path:path}}")
@router.head(f"{FILES}/{{path:path}}", include_in_schema=False)
def file(request: Request, served: Here, path: str) -> Response:
    """Give one file; HEAD gives its size alone."""
    keeping = keeping_of(request)
    if not _is_file(path) or _is_hidden(path, keeping.hidden if keeping else frozenset()):
        raise _no_file(path)
    if path == LOCK:
        lock = keeping.read_lock() if keeping else None
        if lock is None:
            raise _no_file(path)
        return Response(lock, headers={"ETag": tag_of(lock)})
    if kind_of(served.files, path) != "file":
        raise _no_file(path)
    if request.method == "HEAD":
        return Response(headers={"Content-Length": str(served.files.size(path))})
    data = _content(served, path)
    headers = {"ETag": tag_of(data), "Content-Digest": content_digest(data),
               "Content-Length": str(len(data))}  # fmt: skip
    if len(data) <= _SENT_BYTES:
        return Response(bytes(data), headers=headers, media_type="application/octet-stream")
    return StreamingResponse(_parts(data), headers=headers, media_type="application/octet-stream")


def _content(served: Served, path: str) -> memoryview:
    """Read a file: of what never changes parts are read when they are sent."""
    size = served.files.size(path)
    if size and not path.startswith(f"{STAGING}/"):
        return served.files.map(path, size)
    try:
        return memoryview(served.files.read(path))
    except DamagedFile as error:  # removed meanwhile
        raise _no_file(path) from error


def _parts(data: memoryview) -> Iterator[bytes]:
    for first in range(0, len(data), _SENT_BYTES):
        yield bytes(data[first : first + _SENT_BYTES])


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_hidden(path: str, hidden: frozenset[str]) -> bool:
    names = path.split("/")
    return len(names) > 1 and names[0] == STAGING and names[1] in hidden


def _is_file(path: str) -> bool:
    """Tell whether a file of a store may have this path."""
    try:
        file_at(path)
    except BadInput:
        return False
    return True


def _has_file(served: Served, path: str, hidden: frozenset[str]) -> bool:
    """Tell a file, or a folder that has one, from an empty folder, which a client knows not."""
    if path.endswith(_ENDINGS) or kind_of(served.files, path) == "file":
        return True
    return any(not _is_hidden(each, hidden) for each in served.files.walk(path))


def _no_file(path: str) -> Missing:
    return Missing(f"the store has no file {path!r}")
