"""Requests to an object store: what is asked, tried again, and said when it fails.

A request that got no answer, or a 5xx or 429, is sent again for a while. So a conditional write may
meet its own object: whoever asked compares what is there with what it wrote.
"""

from __future__ import annotations

import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from gradstore.errors import BadInput, StoreIOError
from gradstore.storage.location import ObjectPath

if TYPE_CHECKING:
    from obstore.store import S3Store

_log = logging.getLogger(__name__)

#: Seconds for which a request is sent again, and for which the first of all is, whose endpoint may
#: be wrong.
PATIENCE_SECONDS, FIRST_PATIENCE_SECONDS = 60.0, 5.0

#: Seconds between two tries, at first and at most.
_FIRST_WAIT_SECONDS, _WAIT_SECONDS = 0.05, 5.0

#: Seconds after which a connection, and a whole request, counts as lost.
_CONNECT_SECONDS, _REQUEST_SECONDS = 5, 120

#: One of these says where credentials come from; without any the machine's own service is asked.
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_HOW = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN where there is one), "
    "AWS_REGION, and AWS_ENDPOINT_URL for a server other than Amazon's"
)
_STATUS = re.compile(r"status code: ([0-9]{3})")
_CODE = re.compile(r"<Code>([^<]{1,200})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,500})</Message>")

T = TypeVar("T")


class Found(NamedTuple):
    """An object as it was read.

    Attributes:
        data: its bytes, (size,) uint8; none where it is larger than was asked for.
        size: in bytes.
        e_tag: the server's name for this content.
    """

    data: memoryview
    size: int
    e_tag: str


class Bucket:
    """Objects below one prefix of a bucket; keys are relative to it.

    Args:
        place: bucket and prefix. Server and credentials come from the environment (AWS_*).

    Raises:
        BadInput: obstore is not installed, or the environment is no configuration.
    """

    def __init__(self, place: ObjectPath) -> None:
        self.place = place
        self._store = _connected(place)
        self._answered = False

    def get(self, key: str, most_bytes: int = sys.maxsize) -> Found | None:
        """Read an object; None where there is none.

        Args:
            key: its key.
            most_bytes: of a larger one nothing is read but its size.
        """
        import obstore

        def read() -> Found | None:
            try:
                found = obstore.get(self._store, key)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None
            size = found.meta["size"]
            data = memoryview(b"") if size > most_bytes else memoryview(found.bytes())
            return Found(data, size, str(found.meta["e_tag"]))

        return self._tried("read", key, read)

    def size(self, key: str) -> int | None:
        """Return an object's size in bytes; None where there is none."""
        import obstore

        def look() -> int | None:
            try:
                return obstore.head(self._store, key)["size"]
            except FileNotFoundError:
                return None

        return self._tried("look at", key, look)

    def put(self, key: str, data: bytes) -> str | None:
        """Write an object, whatever was there; return its version where the bucket keeps any."""
        import obstore

        put = partial(obstore.put, self._store, key, data, use_multipart=False)
        return self._tried("write", key, put)["version"]

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object that there is not; False, and no change, where there is one.

        It is False too for a write whose answer was lost, so compare what is there.
        """
        return self._put_if("write", key, data, None)

    def swap(self, key: str, data: bytes, e_tag: str | None) -> bool:
        """Write an object in place of the one with an ETag; None: of nothing.

        Returns:
            Whether it holds `data` now, of which no two writers may write the same.
        """
        if self._put_if("replace", key, data, e_tag):
            return True
        found = self.get(key)
        return found is not None and found.data == data

    def _put_if(self, verb: str, key: str, data: bytes, e_tag: str | None) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def write() -> bool:
            mode = "create" if e_tag is None else {"e_tag": e_tag}
            try:
                obstore.put(self._store, key, data, mode=mode, use_multipart=False)  # type: ignore[arg-type]
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

        return self._tried(verb, key, write)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; a missing one is no error."""
        import obstore

        def remove() -> None:
            with suppress(FileNotFoundError):
                obstore.delete(self._store, list(keys))

        if keys:
            self._tried("remove", keys[0], remove)

    def copy(self, key: str, target: str) -> None:
        """Copy an object within the server."""
        import obstore

        self._tried("copy", key, lambda: obstore.copy(self._store, key, target))

    def sizes(self, folder: str) -> dict[str, int]:
        """Map the key of every object below a folder to its size; what was written last may lack.

        Args:
            folder: the keys' beginning, up to a slash; "" for all.
        """
        import obstore

        def collect() -> dict[str, int]:
            found = obstore.list(self._store, folder or None).collect()
            return {each["path"]: each["size"] for each in found}

        return self._tried("list", folder, collect)

    def has_below(self, folder: str) -> bool:
        """Tell whether a listing shows an object below a folder."""
        import obstore

        def first() -> bool:
            return any(len(page) for page in obstore.list(self._store, folder or None))

        return self._tried("list", folder, first)

    def names(self, folder: str) -> set[str]:
        """List the names right below a folder; what was written last may lack."""
        import obstore

        def collect() -> set[str]:
            found = obstore.list_with_delimiter(self._store, folder or None)
            below = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
            return {path.rpartition("/")[2] for path in below}

        return self._tried("list", folder, collect)

    # ---- failures ----------------------------------------------------------------------------

    def _tried(self, verb: str, key: str, act: Callable[[], T]) -> T:
        """Return what a request gives, sent again while its failure may pass.

        Raises:
            StoreIOError: it failed, or failed for too long.
        """
        from obstore.exceptions import BaseError

        began, tries = time.monotonic(), 0
        while True:
            try:
                result = act()
            except (BaseError, OSError, ValueError) as error:
                if _status(error) is not None:
                    self._answered = True
                patience = PATIENCE_SECONDS if self._answered else FIRST_PATIENCE_SECONDS
                wait = min(_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**tries) * random.uniform(0.5, 1)
                if not _may_pass(error) or time.monotonic() - began + wait > patience:
                    raise self._failed(verb, key, error, tries) from error
                if not tries:
                    _log.info("%s: trying again: %s", self.place / key, _reason(error))
                time.sleep(wait)
                tries += 1
            else:
                self._answered = True
                return result

    def _failed(self, verb: str, key: str, error: Exception, tries: int) -> StoreIOError:
        what = f'cannot {verb} "{self.place / key if key else self.place}"'
        text = str(error)
        if "NoSuchBucket" in text:
            return StoreIOError(
                f'{what}: there is no bucket "{self.place.bucket}" at '
                f"{_endpoint()}. Make it, or name another with gradstore=s3://BUCKET/PREFIX"
            )
        if "latest/api/token" in text or "latest/meta-data" in text:
            return StoreIOError(f"{what}: no credentials were found; {_HOW}")
        status = _status(error)
        if status in (401, 403):
            return StoreIOError(
                f"{what}: {_reason(error)}. See that the credentials may read, write, list and "
                f"delete below {self.place}; {_HOW}"
            )
        again = f", and again {tries} time(s)" if tries else ""
        return StoreIOError(
            f"{what} at {_endpoint()}: {_reason(error)}{again}. See that the server is well, then "
            "run again: committed data is untouched"
        )


def _connected(place: ObjectPath) -> S3Store:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError:
        raise BadInput(
            f'store "{place}" needs obstore, which is not installed. Run: '
            "pip install 'dataflex-gradstore[s3]'"
        ) from None
    if os.environ.get("AWS_ACCESS_KEY_ID") and not os.environ.get("AWS_SECRET_ACCESS_KEY"):
        raise BadInput(f'store "{place}": AWS_ACCESS_KEY_ID has no secret; {_HOW}')
    if not any(os.environ.get(name) for name in _CREDENTIALS):
        _log.info("no credentials in the environment: asking this machine's own service")
    try:
        return S3Store(
            place.bucket,
            prefix=place.key or None,
            client_options={
                # An address that begins so was chosen by the user, as of a server on loopback.
                "allow_http": _endpoint().startswith("http://"),
                "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
                "timeout": timedelta(seconds=_REQUEST_SECONDS),
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        )
    except (BaseError, OSError, ValueError) as error:
        raise BadInput(
            f'store "{place}" can\'t be reached with this environment: {_reason(error)}; {_HOW}'
        ) from error


def _endpoint() -> str:
    """Name the server, without what may be secret in its address."""
    given = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or "Amazon S3"
    return re.sub(r"//[^/@]*@", "//", given)


def _status(error: Exception) -> int | None:
    found = _STATUS.search(str(error))
    return None if found is None else int(found[1])


def _may_pass(error: Exception) -> bool:
    """Tell whether the same request may be answered otherwise a moment later."""
    from obstore.exceptions import GenericError

    status = _status(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in (408, 409, 429)
    return isinstance(error, GenericError)


def _reason(error: Exception) -> str:
    """Say why in a line; an answer's body may repeat what is secret, so only its code is told."""
    text = str(error)
    status = _status(error)
    if status is not None:
        told = [found[1] for found in (_CODE.search(text), _MESSAGE.search(text)) if found]
        return f"status {status}" + (f" ({': '.join(told)})" if told else "")
    line = re.sub(r"//[^/@\s]*@", "//", text.split("\n", 1)[0])
    return line.rpartition(" - ")[2][:300]
