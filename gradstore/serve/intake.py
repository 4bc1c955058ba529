"""Bodies that clients send: how many at once, how large, how fast, and that they arrive whole."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import Request
from starlette.requests import ClientDisconnect

from gradstore.serve.problems import Refusal

_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]+={0,2}):")


#: Bytes of a body that is always let in, up to `SMALL_BODIES` at once: signs of life, claims and
#: records, without which whoever waits for room would count as dead.
SMALL_BYTES, SMALL_BODIES = 16 << 10, 1024


@dataclass(frozen=True)
class Limits:
    """Limits of what a server takes in.

    Attributes:
        body_bytes: of one body.
        flight_bytes: of all bodies that are being received or written; a body alone may be larger.
        bodies: that are being received or written, but for small ones.
        pause_seconds: without a byte of a body, after which its client counts as gone.
        slowest_bytes: per second that a body must come with on the whole, after `pause_seconds`.
    """

    body_bytes: int = 128 << 20
    flight_bytes: int = 512 << 20
    bodies: int = 64
    pause_seconds: float = 20.0
    slowest_bytes: int = 64 << 10


class Intake:
    """Count of what is being taken in; used on the event loop alone.

    Args:
        limits: of it.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._bodies = self._bytes = self._small = 0

    @contextmanager
    def admitted(self, size: int) -> Iterator[None]:
        """Count a body for the block.

        Raises:
            Refusal: 429, too many are being taken in; nothing of this one was read.
        """
        limits = self.limits
        if size <= SMALL_BYTES and self._small < SMALL_BODIES:
            self._small += 1
            try:
                yield
            finally:
                self._small -= 1
            return
        full = self._bodies >= limits.bodies or (
            self._bodies > 0 and self._bytes + size > limits.flight_bytes
        )
        if full:
            raise Refusal(429, "too-many-writes", f"{self._bodies} writes of {self._bytes:,} bytes "
                          f"are being taken in; {limits.bodies} of {limits.flight_bytes:,} are "
                          "the most. Send it again in a second", exit_code=5, wait_seconds=1
                          )  # fmt: skip
        self._bodies += 1
        self._bytes += size
        try:
            yield
        finally:
            self._bodies -= 1
            self._bytes -= size

    async def received(self, request: Request, size: int) -> bytes:
        """Receive a body, and compare it with what its headers say.

        Args:
            request: with a Content-Digest.
            size: its Content-Length.

        Raises:
            Refusal: 400, it is shorter or longer, or its digest is another; 408, it is too slow.
        """
        limits = self.limits
        expected = digest_of(request)
        data, digest = bytearray(), hashlib.sha256()
        seconds = limits.pause_seconds + size / limits.slowest_bytes
        try:
            async with asyncio.timeout(seconds):
                parts = request.stream().__aiter__()
                while True:
                    async with asyncio.timeout(limits.pause_seconds):
                        part = await anext(parts, None)
                    if part is None:
                        break
                    if len(data) + len(part) > size:
                        raise _other_length(size, f"more than {size:,}")
                    data += part
                    digest.update(part)
        except TimeoutError:
            raise Refusal(408, "too-slow", f"{len(data):,} of {size:,} bytes came, then too few in "
                          f"{limits.pause_seconds:g} s or more", exit_code=5) from None  # fmt: skip
        except ClientDisconnect:
            raise _other_length(size, f"{len(data):,}") from None
        if len(data) != size:
            raise _other_length(size, f"{len(data):,}")
        if not hmac.compare_digest(digest.digest(), expected):
            raise Refusal(400, "other-digest", "the body is not that of its Content-Digest: it was "
                          "changed on the way. Send it again", exit_code=5)  # fmt: skip
        return bytes(data)

    async def passed_over(self, request: Request) -> None:
        """Read what is left of a refused body, for a while, so that its client hears the answer."""
        left = 2 * self.limits.body_bytes
        try:
            async with asyncio.timeout(self.limits.pause_seconds):
                async for part in request.stream():
                    left -= len(part)
                    if left < 0:
                        return
        except (TimeoutError, ClientDisconnect, RuntimeError):  # or it was read to its end before
            return


def length_of(request: Request, most: int) -> int:
    """Return the declared length of a body in bytes.

    Raises:
        Refusal: 411, there is none; 413, it is more than `most`.
    """
    given = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or not re.fullmatch(r"[0-9]{1,18}", given):
        raise Refusal(411, "no-length", "a body needs its Content-Length")
    if int(given) > most:
        raise Refusal(413, "too-large", f"the body has {int(given):,} bytes, and {most:,} are the "
                      "most that this server takes; start it with --max-body "
                      f"{-(-int(given) >> 20):d} or more", exit_code=5)  # fmt: skip
    return int(given)


def digest_of(request: Request) -> bytes:
    """Return the sha256 that the field Content-Digest (RFC 9530) gives.

    Raises:
        Refusal: 400, there is none.
    """
    found = _SHA256.search(request.headers.get("content-digest", ""))
    try:
        digest = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise Refusal(400, "no-digest", "a body needs the field Content-Digest with its sha256: "
                      "sha-256=:BASE64:")  # fmt: skip
    return digest


def _other_length(size: int, found: str) -> Refusal:
    return Refusal(400, "other-length", f"the body has {found} bytes, {size:,} were declared",
                   exit_code=5)  # fmt: skip
