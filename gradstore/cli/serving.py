"""The command that serves a store to a browser and to programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from gradstore.cli.options import StorePath, app

if TYPE_CHECKING:
    from gradstore.serve.served import Explainer
    from gradstore.storage.location import Location

#: The default port.
PORT = 8417

#: Opens the model of a store, where the command line has one; set by `dataflex`.
open_explainer: Callable[[Location], Explainer | None] = lambda _: None  # noqa: E731


@app.command()
def serve(
    store: StorePath,
    port: Annotated[
        int, typer.Option(help="Port on loopback; 0 takes any free one.", min=0, max=65535)
    ] = PORT,
) -> None:
    """Serve a store, read-only, on this machine: a page to explore it, and an API under /v1."""
    # First: it chooses how much other libraries say, which they read when they are imported.
    explainer = open_explainer(store)
    from gradstore.serve.running import serve as run

    def say(address: str) -> None:
        typer.echo(f"store {store} is served at\n  {address}\nCtrl-C ends it.")

    try:
        run(store, port, say, explainer)
    except KeyboardInterrupt:  # the way to end it, so no failure
        typer.echo("\nstopped.", err=True)
        raise SystemExit(130) from None
