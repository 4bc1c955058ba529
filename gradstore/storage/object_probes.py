"""A probe of a server of objects: whether it keeps the two conditions of a put."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gradstore.errors import StoreIOError
from gradstore.storage.bucket import Bucket
from gradstore.storage.local import STAGING

#: An ETag that no content has.
_NO_TAG = '"00000000000000000000000000000000"'

#: Probes of a server that seems to ignore a condition: a writer that cleans up may remove one.
_PROBES = 3


class _Ignored(Exception):
    """A breach of a condition by a server, unless somebody removed the probe meanwhile."""

    def __init__(self, header: str, what: str) -> None:
        super().__init__(header, what)
        self.header, self.what = header, what


def probe_server(bucket: Bucket) -> None:
    """See that a server honours If-None-Match and If-Match.

    Whoever has the store's lock removes from staging what no holder owns, a probe too; so a server
    is believed to ignore a condition only when it did so for several probes.

    Raises:
        StoreIOError: it ignores or refuses one; names it.
    """
    for left in reversed(range(_PROBES)):
        key = f"{STAGING}/probe-{secrets.token_hex(8)}"
        try:
            _probe(bucket, key)
            return
        except _Ignored as error:
            if not left:
                raise _not_honoured(bucket, error.header, error.what) from None
        finally:
            with suppress(StoreIOError):
                bucket.delete([key])


def _probe(bucket: Bucket, key: str) -> None:
    with _condition(bucket, "If-None-Match"):
        bucket.put_new(key, b"first")
        second = bucket.put_new(key, b"second")
    found = bucket.get(key)
    if second or found is None or bytes(found.data) != b"first":
        raise _Ignored("If-None-Match", "a second write to a taken name replaced it")
    with _condition(bucket, "If-Match"):
        if bucket.swap(key, b"third", _NO_TAG):
            raise _Ignored("If-Match", "a write over other content replaced it")
        if not bucket.swap(key, b"fourth", found.e_tag):
            raise _Ignored("If-Match", "a write over the same content was refused")


@contextmanager
def _condition(bucket: Bucket, header: str) -> Iterator[None]:
    """Name the header where a server answers it with an error of the request."""
    try:
        yield
    except StoreIOError as error:
        text = str(error)
        if "status 400" in text or "status 501" in text:
            what = "the server refused a write with it"
            raise _not_honoured(bucket, header, what) from error
        raise


def _not_honoured(bucket: Bucket, header: str, what: str) -> StoreIOError:
    return StoreIOError(
        f'the object store of "{bucket.place}" does not honour {header}: {what}. A store needs '
        "a server that honours If-None-Match and If-Match on PUT, as Amazon S3 does; "
        "choose another with AWS_ENDPOINT_URL, or a folder with gradstore=PATH"
    )
