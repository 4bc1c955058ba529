"""Running the server: one port on loopback, one token, until Ctrl-C."""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Callable

import uvicorn

from gradstore.errors import BadInput
from gradstore.serve.app import create_app
from gradstore.serve.jobs import Desk
from gradstore.serve.served import Explainer, Served
from gradstore.storage.location import Location

HOST = "127.0.0.1"

#: Environment variable that fixes the token, for scripts; else it is made anew at each start.
TOKEN = "GRADSTORE_TOKEN"

#: Shortest token that is taken.
TOKEN_CHARACTERS = 16


def listen(port: int) -> socket.socket:
    """Open a port on loopback.

    Args:
        port: 0 takes any free one.

    Raises:
        BadInput: it is in use, or not ours to open.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
    except (OSError, OverflowError) as error:
        found.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            said = "is in use, perhaps by another `gradstore serve`"
        else:
            said = f"can't be opened: {getattr(error, 'strerror', None) or error}"
        raise BadInput(f"port {port} {said}; choose another with --port N (0: any free "
                       "one).") from error  # fmt: skip
    return found


def own_token() -> str:
    """Return the token of this start.

    Raises:
        BadInput: the one given in the environment is too short, or can't stand in an address.
    """
    given = os.environ.get(TOKEN)
    if given is None:
        return secrets.token_urlsafe(24)
    if len(given) < TOKEN_CHARACTERS or not given.replace("-", "").replace("_", "").isalnum():
        raise BadInput(f"{TOKEN} has {len(given)} characters; give at least {TOKEN_CHARACTERS} "
                       "letters, digits, - or _, or unset it.")  # fmt: skip
    return given


def serve(
    path: Location,
    port: int,
    say: Callable[[str], None],
    explainer: Explainer | None = None,
) -> None:
    """Serve a store until Ctrl-C.

    Args:
        path: where the store is.
        port: on loopback; 0 takes any free one.
        say: gets the page's address, with the token, once the port is open.
        explainer: a model at hand.

    Raises:
        KeyboardInterrupt: Ctrl-C, after requests and jobs were ended.
        BadInput: no store, or a port that can't be opened.
    """
    token = own_token()
    served = Served(path, explainer)
    sock = listen(port)
    config = uvicorn.Config(
        create_app(served, token),
        # Its warnings are of what clients send, such as bytes that are no HTTP.
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    sock.listen(config.backlog)
    say(f"http://{HOST}:{sock.getsockname()[1]}/?token={token}")
    _Server(config, served.desk).run(sockets=[sock])


class _Server(uvicorn.Server):
    """Server that lets go of those who wait for a job before it waits for them."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is still asked, then end."""
        self._desk.close(seconds=0)
        await super().shutdown(sockets)
