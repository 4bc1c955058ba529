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
    writable: Annotated[
        bool,
        typer.Option(
            "--writable",
            help="Take what trainings and builds elsewhere write, gradstore=https://HOST there; "
            "nobody else writes to the store meanwhile. It is made if need be.",
        ),
    ] = False,
    max_body: Annotated[
        int, typer.Option(help="Largest file that is taken, in MiB.", min=1, max=5120)
    ] = 128,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name under which a reverse proxy passes requests on; repeat for more."),
    ] = None,
) -> None:
    """Serve a store on this machine: a page to explore it, and an API under /v1.

    Nothing is written to the store, unless --writable takes what others write.
    """
    # First: it chooses how much other libraries say, which they read when they are imported.
    explainer = open_explainer(store)
    from gradstore.serve.running import Offer
    from gradstore.serve.running import serve as run

    def say(address: str, key: str | None) -> None:
        typer.echo(f"store {store} is served at\n  {address}")
        if key is not None:
            typer.echo(f"who writes sets\n  GRADSTORE_WRITE_TOKEN={key}")
        typer.echo("Ctrl-C ends it.")

    try:
        run(store, port, say, explainer, Offer(writable, max_body << 20, tuple(host or ())))
    except KeyboardInterrupt:  # the way to end it, so no failure
        typer.echo("\nstopped.", err=True)
        raise SystemExit(130) from None
