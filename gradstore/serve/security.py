"""The door: who may ask, under which host name, and what a browser may do with the answer.

A loopback port is open to every user and every web page of the machine. So each request needs the
token; its Host must be a loopback name (a page of another site that lets its own name resolve to
127.0.0.1 is refused); and what a browser sends for another site's page is refused by its Origin.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradstore.serve.problems import problem
from gradstore.storage.location import LOOPBACK
from gradstore.storage.wire import FILES, MARK

#: Largest body of a request, in bytes.
BODY_BYTES = 4 << 20

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; object-src 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
}

_ASK = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Gradient store</title>
<h1>Gradient store</h1><p>%s</p><form method="get"><label>Token
<input name="token" type="password" autocomplete="off" autofocus></label>
<button>Open</button></form></html>"""

_NO_TOKEN = (
    "no token, or a wrong one. Open the address that `gradstore serve` printed, or send the header "
    "Authorization: Bearer TOKEN"
)


class Door:
    """ASGI middleware that lets requests through to `app`.

    Args:
        app: what is guarded.
        token: what a request must show.
        write_key: what one shows that changes the store, in a header alone; it lets the rest in,
            too. None where nothing is written.
        most_bytes: of a body that is written.
        hosts: host names under which the server may be asked; a port is not compared, so that it
            can be reached through a tunnel.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        write_key: str | None = None,
        most_bytes: int = 0,
        hosts: Sequence[str] = LOOPBACK,
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._write_key = None if write_key is None else write_key.encode()
        self._most_bytes = most_bytes
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"].startswith("/v1/"):
                    headers[MARK] = str(self._most_bytes)
            await send(message)

        if refusal is not None:
            await refusal(scope, receive, sealed)
        else:
            await self._app(scope, receive, sealed)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = host_name(f"//{headers.get('host', '')}")
        if host not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            return problem(403, "foreign-host", f"the host name {headers.get('host', '')!r} is not "
                           f"this server's; ask it as one of {known}, or start it with --host NAME."
                           )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and host_name(origin) not in self._hosts:
            return problem(403, "foreign-origin", f"a page of {origin!r} may not ask this server; "
                           "open the server's own page.")  # fmt: skip
        refusal = self._unknown(scope, headers)
        taken = self._write_key is not None and scope["method"] == "PUT"
        if refusal is None and not (taken and scope["path"].startswith(f"{FILES}/")):
            length = headers.get("content-length", "0")
            if "transfer-encoding" in headers or not length.isdigit() or int(length) > BODY_BYTES:
                return problem(413, "too-large", "the body must have a length, of at most "
                               f"{BODY_BYTES:,} bytes; ask for less at once.")  # fmt: skip
        return refusal

    def _unknown(self, scope: Scope, headers: Headers) -> Response | None:
        """Check the token; one in a page's address is moved into a cookie."""
        cookie = cookie_name(scope)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        shown = [*given, *_bearer(headers), *_cookies(headers, cookie)]
        # Every one is compared, and in constant time.
        known = [_same(each, self._token) for each in shown]
        writes = [_same(each, self._write_key or b"") for each in _bearer(headers)]
        may_write = self._write_key is not None and any(writes)
        scope.setdefault("state", {})["may_write"] = may_write
        if not any(known) and not may_write:
            if scope["path"] == "/" and "text/html" in headers.get("accept", ""):
                said = "That token is wrong." if given else "This server needs its token."
                return HTMLResponse(_ASK % said, 401)
            return problem(401, "no-token", _NO_TOKEN, headers={"WWW-Authenticate": "Bearer"})
        if given and scope["path"] == "/" and scope["method"] == "GET":
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            answer = RedirectResponse(f"/?{rest}" if rest else "/", 303)
            # Lax, so that a link in a colleague's message opens the page.
            answer.set_cookie(cookie, self._token.decode(), httponly=True, samesite="lax")
            return answer
        return None


def host_name(address: str) -> str:
    """Return the host name of an address, "" where there is none.

    An address with a user name has none: neither a Host nor an Origin may hold one.

    >>> host_name("//127.0.0.1:8400"), host_name("http://[::1]:1"), host_name("null")
    ('127.0.0.1', '::1', '')
    >>> host_name("//evil.example@localhost")
    ''
    """
    try:
        parts = urlsplit(address)
        return "" if "@" in parts.netloc else parts.hostname or ""
    except ValueError:
        return ""


def cookie_name(scope: Scope) -> str:
    """Name the cookie of this server: cookies are shared between the ports of a host."""
    return f"gradstore-{(scope.get('server') or ('', 0))[1]}"


def _same(given: str, key: bytes) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), key)


def _bearer(headers: Headers) -> Iterable[str]:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return [token.strip()] if kind.lower() == "bearer" else []


def _cookies(headers: Headers, name: str) -> Iterable[str]:
    try:
        jar = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return []
    return [jar[name].value] if name in jar else []
