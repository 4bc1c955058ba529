"""The application: paths under /v1, the explorer's page at /, and the door in front of both."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

from gradstore.serve import explaining, looking, problems, questions
from gradstore.serve.answers import Unchanged, still_running, unchanged
from gradstore.serve.jobs import StillRunning
from gradstore.serve.security import Door
from gradstore.serve.served import Served

_log = logging.getLogger(__name__)

#: The explorer: HTML, CSS and ES modules, sent as they are.
PAGE = Path(__file__).parent / "page"


def create_app(served: Served, token: str) -> FastAPI:
    """Build the application.

    Args:
        served: the store, and the model if there is one.
        token: what a request must show.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        served.desk.close()

    app = FastAPI(
        title="Gradient store",
        version="1",
        description="Read-only access to one gradient store: rows, scores, who helped whom.",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # its pages load scripts from another server
        redoc_url=None,
        lifespan=life,
    )
    app.state.served = served
    problems.install(app)
    app.add_exception_handler(StillRunning, still_running)
    app.add_exception_handler(Unchanged, unchanged)
    app.add_exception_handler(Exception, _unexpected)
    for paths in (looking, questions, explaining):
        app.include_router(paths.router)
    app.add_api_route("/", _page, include_in_schema=False)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_middleware(Door, token=token)
    return app


def _page() -> Response:
    return FileResponse(PAGE / "index.html")


def _unexpected(request: Request, error: Exception) -> Response:
    """Answer 500 for a bug of ours; the traceback is the server's, not the client's."""
    _log.error("%s %s: %s: %s", request.method, request.url.path, type(error).__name__, error)
    return problems.problem(500, "bug", f"{type(error).__name__} in the server; its log says more.")
