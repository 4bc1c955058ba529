"""Running the server: one port on loopback, one key or two, until Ctrl-C."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import uvicorn

from gradstore.errors import BadInput
from gradstore.serve.app import create_app
from gradstore.serve.intake import Limits
from gradstore.serve.jobs import Desk
from gradstore.serve.keeping import Keeping
from gradstore.serve.keys import both_keys, own_token
from gradstore.serve.served import Explainer, Served
from gradstore.serve.writing import Writing
from gradstore.storage.location import Location
from gradstore.storage.wire import WRITE_KEY

HOST = "127.0.0.1"

#: Seconds for which an unused connection is kept; clients give theirs up sooner.
_KEPT_SECONDS = 60


def listen(port: int) -> socket.socket:
    """Open a port on loopback.

    Args:
        port: 0 takes any free one.

    Raises:
        BadInput: it is in use, or not ours to open.
    """
    # asyncio sends small parts at once, without waiting for more, of sockets that say TCP alone.
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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


@dataclass(frozen=True)
class Offer:
    """Things that a server does beside answering on loopback.

    Attributes:
        writable: it takes writes.
        most_bytes: of one body that is written.
        hosts: names under which a proxy passes requests on.
    """

    writable: bool = False
    most_bytes: int = Limits.body_bytes
    hosts: Sequence[str] = ()


def serve(
    path: Location,
    port: int,
    say: Callable[[str, str | None], None],
    explainer: Explainer | None = None,
    offer: Offer | None = None,
) -> None:
    """Serve a store until Ctrl-C.

    Args:
        path: where the store is.
        port: on loopback; 0 takes any free one.
        say: gets the page's address, with the token, once the port is open; and the key that
            writes, where one was made.
        explainer: a model at hand.
        offer: further things that it does.

    Raises:
        KeyboardInterrupt: Ctrl-C, after requests and jobs were ended.
        BadInput: no store, or a port that can't be opened.
        StoreBusy: it is to take writes, and another process writes to the store.
        StoreIOError: it is to take writes, and can't write.
    """
    offer = offer or Offer()
    token, key = both_keys() if offer.writable else (own_token(), None)
    served = Served(path, explainer, is_made=offer.writable)
    sock = listen(port)
    writing = None
    if key is not None:
        limits = Limits(offer.most_bytes, max(Limits.flight_bytes, offer.most_bytes))
        try:
            writing = Writing(key, Keeping(served), limits)
        except BaseException:
            sock.close()
            raise
    config = uvicorn.Config(
        create_app(served, token, writing, offer.hosts),
        # Its warnings are of what clients send, such as bytes that are no HTTP.
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=_KEPT_SECONDS,
    )
    sock.listen(config.backlog)
    made = None if os.environ.get(WRITE_KEY) else key
    say(f"http://{HOST}:{sock.getsockname()[1]}/?token={token}", made)
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
