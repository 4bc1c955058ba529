"""Requests to a service that has a store: `dataflex-cli gradstore serve`, behind http or https."""

from __future__ import annotations

import os
import re
import secrets
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gradstore.errors import (
    BadInput,
    DamagedData,
    ProvenanceMismatch,
    StoreBusy,
    StoreError,
    StoreIOError,
)
from gradstore.format.names import printable
from gradstore.storage.bucket import Bucket, Failure, Found
from gradstore.storage.local import STAGING
from gradstore.storage.location import ObjectPath
from gradstore.storage.wire import (
    COPIES,
    FILES,
    MARK,
    READ_KEY,
    REMOVALS,
    WRITE_KEY,
    WRITER,
    content_digest,
    key_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

#: Seconds after which a connection, and a pause within a request, counts as lost: a server answers
#: a write when the disk has it, and a commit when every unit was looked at.
_CONNECT_SECONDS, _PAUSE_SECONDS = 5.0, 120.0

#: Connections that are kept, and seconds for which one is, unused; the server keeps them longer.
_CONNECTIONS, _KEPT_SECONDS = 32, 30.0

#: Answers that may be others a moment later; 507 (disk full) and 501 are not.
_PASSING = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}

#: Longest time that a server may ask to wait for.
_MOST_WAIT_SECONDS = 30.0

_ERRORS = {2: BadInput, 4: DamagedData, 5: StoreIOError, 6: StoreBusy}


class _Refused(Exception):
    """An answer that is none of those that were hoped for."""

    def __init__(self, status: int, headers: Mapping[str, str], body: Mapping[str, Any]) -> None:
        self.status, self.headers, self.body = status, headers, body
        #: What the server says, where it is one of ours, and the exit code that it would end with.
        self.detail, self.told_code = (
            printable(str(body.get("detail") or "")),
            body.get("exit_code"),
        )
        super().__init__(f"status {status}" + (f" ({self.detail})" if self.detail else ""))


class ServiceBucket(Bucket):
    """Files of the one store that a service has; see `Bucket`.

    Args:
        place: the service. The key comes from the environment.

    Raises:
        BadInput: there is no key.
    """

    def __init__(self, place: ObjectPath) -> None:
        super().__init__(place)
        self._key = key_for(place)
        self._client: httpx.Client | None = None
        self._pid, self._lock = 0, threading.Lock()

    def get(self, key: str, most_bytes: int = sys.maxsize) -> Found | None:
        """Read a file; see `Bucket`."""

        def read() -> Found | None:
            with self._answer("GET", _file(key), hoped=(200, 404)) as answer:
                if answer.status_code == HTTPStatus.NOT_FOUND:
                    return None
                size, tag = _length(answer), answer.headers.get("etag", "").removeprefix("W/")
                if size > most_bytes:
                    return Found(memoryview(b""), size, tag)
                return Found(memoryview(answer.read()), size, tag)

        return self._tried("read", key, read)

    def size(self, key: str) -> int | None:
        """Return a file's size; see `Bucket`."""

        def look() -> int | None:
            with self._answer("HEAD", _file(key), hoped=(200, 404)) as answer:
                found = answer.status_code == HTTPStatus.OK
                return _length(answer) if found else None

        return self._tried("look at", key, look)

    def put(self, key: str, data: bytes) -> None:
        """Write a file; see `Bucket`."""
        self._changed("write", [key], lambda: self._write(key, data, {}))

    def _put_if(self, verb: str, key: str, data: bytes, e_tag: str | None) -> bool:
        condition = {"If-None-Match": "*"} if e_tag is None else {"If-Match": e_tag}
        return self._changed(verb, [key], lambda: self._write(key, data, condition))

    def _write(self, key: str, data: bytes, condition: Mapping[str, str]) -> bool:
        """Send a file; False where the condition does not hold."""
        headers = {"Content-Digest": content_digest(data), **condition,
                   "Content-Type": "application/octet-stream"}  # fmt: skip
        hoped = (200, 201, 412)
        with self._answer("PUT", _file(key), data, headers, hoped) as answer:
            return answer.status_code != HTTPStatus.PRECONDITION_FAILED

    def delete(self, keys: Sequence[str]) -> None:
        """Remove files; see `Bucket`."""
        if keys:
            self._changed("remove", keys, lambda: self._json(REMOVALS, {"paths": list(keys)}))

    def copy(self, key: str, target: str) -> None:
        """Copy a file; see `Bucket`."""
        self._changed(
            "copy", [key, target], lambda: self._json(COPIES, {"source": key, "target": target})
        )

    def sizes(self, folder: str) -> dict[str, int]:
        """Map paths below a folder to sizes; see `Bucket`."""
        found: dict[str, int] = self._listed(folder, deep=True)
        return found

    def has_below(self, folder: str) -> bool:
        """Tell whether there is a file below a folder; see `Bucket`."""
        return bool(self._listed(folder, deep=False))

    def names(self, folder: str) -> set[str]:
        """List names; see `Bucket`."""
        return set(self._listed(folder, deep=False))

    def check_writable(self) -> None:
        """Write an empty file into staging, and remove it; see `Bucket`."""
        key = f"{STAGING}/probe-{secrets.token_hex(8)}"
        self.put(key, b"")
        self.delete([key])

    # ---- requests ----------------------------------------------------------------------------

    def _listed(self, folder: str, *, deep: bool) -> Any:  # noqa: ANN401 - what the server lists
        """Return path -> size of all files below a folder, or the names right below it."""
        below = quote(folder.rstrip("/"), safe="")
        url = f"{FILES}?below={below}&deep={str(deep).lower()}"

        def look() -> Any:  # noqa: ANN401 - what the server lists
            with self._answer("GET", url) as answer:
                return _object(answer.read())["files" if deep else "names"]

        return self._tried("list", folder, look)

    def _json(self, url: str, document: Mapping[str, Any]) -> None:
        import json

        headers = {"Content-Type": "application/json"}
        with self._answer("POST", url, json.dumps(document).encode(), headers):
            pass

    @contextmanager
    def _answer(
        self,
        method: str,
        url: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        hoped: Sequence[int] = (200,),
    ) -> Iterator[httpx.Response]:
        """Ask once; the answer's body is read in the block, or not at all.

        Raises:
            _Refused: the answer's status is none that was hoped for.
        """
        prefix = f"/{self.place.key}" if self.place.key else ""
        client = self._connected()
        if self.writer and method in ("PUT", "POST"):
            headers = {**(headers or {}), WRITER: self.writer}
        address = f"{self.place.scheme}://{self.place.bucket}{prefix}{url}"
        with client.stream(method, address, content=data, headers=headers) as answer:
            ours = MARK in answer.headers
            if answer.status_code not in hoped or not ours:
                length = int(answer.headers.get("content-length") or 0)
                body = _object(answer.read()) if ours and length < 1 << 20 else {}
                raise _Refused(answer.status_code, answer.headers, body)
            yield answer

    def _connected(self) -> httpx.Client:
        """Return this process's client; a forked child makes its own, on sockets of its own."""
        with self._lock:
            if self._client is None or self._pid != os.getpid():
                self._client, self._pid = _client(self._key, self.place.scheme), os.getpid()
                weakref.finalize(self, self._client.close)
            return self._client

    # ---- failures ----------------------------------------------------------------------------

    def _failures(self) -> tuple[type[Exception], ...]:
        import httpx

        return (httpx.HTTPError, _Refused, OSError)

    def _judged(self, error: Exception) -> Failure:
        if not isinstance(error, _Refused):
            return Failure(False, not _is_of_certificates(error), _reason(error))
        changed_on_its_way = error.status == HTTPStatus.BAD_REQUEST and error.told_code == 5
        passes = error.status in _PASSING or changed_on_its_way
        given = error.headers.get("retry-after", "")
        wait = float(given) if re.fullmatch(r"[0-9]{1,6}", given) else 0.0
        ours = MARK in error.headers
        is_busy = ours and error.status == HTTPStatus.TOO_MANY_REQUESTS
        return Failure(ours, passes, str(error), min(wait, _MOST_WAIT_SECONDS), is_busy)

    def _failed(self, what: str, error: Exception, failure: Failure, again: str) -> StoreError:
        if not isinstance(error, _Refused) or failure.may_pass:
            return StoreIOError(
                f"{what}: {failure.reason}{again}. See that the service is well and the address is "
                "right, then run again: committed data is untouched"
            )
        differences = error.body.get("differences")
        if isinstance(differences, list):
            return ProvenanceMismatch(error.detail, [printable(str(each)) for each in differences])
        if MARK not in error.headers:
            return StoreIOError(f"{what}: {_not_ours(error, self.place)}")
        detail = _SAID.get(error.status) or error.detail or failure.reason
        kind = _ERRORS.get(error.told_code or 5, StoreIOError)
        return kind(f"{what}: {detail}")


_SAID: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: f"the service does not know this key. Set {READ_KEY}, or {WRITE_KEY} "
    "to write, to one of those that it was started with",
    HTTPStatus.METHOD_NOT_ALLOWED: "the service takes no writes. Start it with --writable",
}


def _client(key: str, scheme: str) -> httpx.Client:
    import httpx

    return httpx.Client(
        headers={
            "Authorization": f"Bearer {key}",
            "User-Agent": "gradstore",
            "Accept-Encoding": "identity",
        },
        timeout=httpx.Timeout(_PAUSE_SECONDS, connect=_CONNECT_SECONDS),
        limits=httpx.Limits(
            max_connections=_CONNECTIONS,
            max_keepalive_connections=_CONNECTIONS,
            keepalive_expiry=_KEPT_SECONDS,
        ),
        # No proxy of the environment may see what goes to loopback in the clear. A redirect is not
        # followed: the key is for the one host that the user named.
        trust_env=scheme != "http",
        verify=scheme != "http",  # which has no certificates: that saves loading the known ones
        follow_redirects=False,
    )


def _length(answer: httpx.Response) -> int:
    """Return the declared size of an answer in bytes.

    Raises:
        StoreIOError: it has none.
    """
    found = answer.headers.get("content-length")
    if found is None:
        raise StoreIOError(
            f"{answer.url}: the answer has no Content-Length. See that no proxy before the service "
            "compresses or rewrites what it passes on"
        )
    return int(found)


def _file(key: str) -> str:
    return f"{FILES}/{quote(key, safe='/+=@')}"


def _object(data: bytes) -> dict[str, Any]:
    """Read a JSON object; {} for anything else."""
    import json

    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_of_certificates(error: Exception) -> bool:
    return "certificate" in str(error).lower()


def _reason(error: Exception) -> str:
    """Say why in a line; text of libraries never holds a header that was sent."""
    line = str(error).split("\n", 1)[0][:300]
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    more = "; SSL_CERT_FILE names certificates to trust" if _is_of_certificates(error) else ""
    return (f"{name}: {line}" if line else name) + more


def _not_ours(error: _Refused, place: ObjectPath) -> str:
    """Say of an answer that is not from a service of ours what it may be."""
    if 300 <= error.status < 400:
        return (
            f"{place.bucket} redirects (status {error.status}), and the key is sent to no other "
            "address than the one that is given. Give the address it leads to"
        )
    return (
        f"status {error.status} of something else than `dataflex-cli gradstore serve`, or of an "
        "older release of it. Check the address, its path and the proxy before it"
    )
