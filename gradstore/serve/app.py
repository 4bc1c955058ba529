"""The application: paths under /v1, the explorer's page at /, and the door in front of both."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

from gradstore.serve import explaining, files, looking, problems, questions
from gradstore.serve.answers import Unchanged, still_running, unchanged
from gradstore.serve.jobs import StillRunning
from gradstore.serve.security import Door
from gradstore.serve.served import Served
from gradstore.serve.writing import Writing
from gradstore.serve.writing import router as changes
from gradstore.storage.location import LOOPBACK

_log = logging.getLogger(__name__)

#: The explorer: HTML, CSS and ES modules, sent as they are.
PAGE = Path(__file__).parent / "page"


def create_app(
    served: Served, token: str, writing: Writing | None = None, hosts: Sequence[str] = ()
) -> FastAPI:
    """Build the application.

    Args:
        served: the store, and the model if there is one.
        token: what a request must show.
        writing: takes what is written; closed when the application ends. None for reading alone.
        hosts: names under which the server may be asked, beside those of loopback.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        served.desk.close()
        if writing is not None:
            writing.close()

    app = FastAPI(
        title="Gradient store",
        version="1",
        description="Access to one gradient store: rows, scores, who helped whom, and its files.",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # its pages load scripts from another server
        redoc_url=None,
        lifespan=life,
    )
    app.state.served = served
    app.state.writing = writing
    app.state.keeping = None if writing is None else writing.keeping
    problems.install(app)
    app.add_exception_handler(StillRunning, still_running)
    app.add_exception_handler(Unchanged, unchanged)
    app.add_exception_handler(Exception, _unexpected)
    for paths in (looking, questions, explaining, files):
        app.include_router(paths.router)
    if writing is not None:
        app.include_router(changes)
    app.add_api_route("/", _page, include_in_schema=False)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_middleware(
        Door, token=token, hosts=(*LOOPBACK, *hosts),
        write_key=None if writing is None else writing.key,
        most_bytes=0 if writing is None else writing.limits.body_bytes,
    )  # fmt: skip
    return app


def _page() -> Response:
    return FileResponse(PAGE / "index.html")


def _unexpected(request: Request, error: Exception) -> Response:
    """Answer 500 for a bug of ours; the traceback is the server's, not the client's."""
    _log.error("%s %s: %s: %s", request.method, request.url.path, type(error).__name__, error)
    return problems.problem(500, "bug", f"{type(error).__name__} in the server; its log says more.")
