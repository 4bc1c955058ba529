"""Requests to an object store that speaks the protocol of Amazon S3."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from gradstore.errors import BadInput, StoreIOError
from gradstore.storage.bucket import Bucket, Failure, Found
from gradstore.storage.location import ObjectPath

if TYPE_CHECKING:
    from obstore.store import S3Store

_log = logging.getLogger(__name__)

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


class S3Bucket(Bucket):
    """Objects below one prefix of a bucket; see `Bucket`.

    Args:
        place: bucket and prefix. Server and credentials come from the environment (AWS_*).

    Raises:
        BadInput: obstore is not installed, or the environment is no configuration.
    """

    def __init__(self, place: ObjectPath) -> None:
        super().__init__(place)
        self._store = _connected(place)

    def get(self, key: str, most_bytes: int = sys.maxsize) -> Found | None:
        """Read an object; see `Bucket`."""
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
        """Return an object's size; see `Bucket`."""
        import obstore

        def look() -> int | None:
            try:
                return obstore.head(self._store, key)["size"]
            except FileNotFoundError:
                return None

        return self._tried("look at", key, look)

    def put(self, key: str, data: bytes) -> str | None:
        """Write an object; see `Bucket`."""
        import obstore

        put = partial(obstore.put, self._store, key, data, use_multipart=False)
        return self._changed("write", [key], put)["version"]

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

        return self._changed(verb, [key], write)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; see `Bucket`."""
        import obstore

        def remove() -> None:
            with suppress(FileNotFoundError):
                obstore.delete(self._store, list(keys))

        if keys:
            self._changed("remove", keys, remove)

    def copy(self, key: str, target: str) -> None:
        """Copy an object; see `Bucket`."""
        import obstore

        self._changed("copy", [key, target], lambda: obstore.copy(self._store, key, target))

    def sizes(self, folder: str) -> dict[str, int]:
        """Map keys below a folder to sizes; see `Bucket`."""
        import obstore

        def collect() -> dict[str, int]:
            found = obstore.list(self._store, folder or None).collect()
            return {each["path"]: each["size"] for each in found}

        return self._tried("list", folder, collect)

    def has_below(self, folder: str) -> bool:
        """Tell whether there is an object below a folder; see `Bucket`."""
        import obstore

        def first() -> bool:
            return any(len(page) for page in obstore.list(self._store, folder or None))

        return self._tried("list", folder, first)

    def names(self, folder: str) -> set[str]:
        """List names; see `Bucket`."""
        import obstore

        def collect() -> set[str]:
            found = obstore.list_with_delimiter(self._store, folder or None)
            below = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
            return {path.rpartition("/")[2] for path in below}

        return self._tried("list", folder, collect)

    def check_writable(self) -> None:
        """Ask nothing: what credentials may do shows at the first write; see `Bucket`."""

    # ---- failures ----------------------------------------------------------------------------

    def _failures(self) -> tuple[type[Exception], ...]:
        from obstore.exceptions import BaseError

        return (BaseError, OSError, ValueError)

    def _judged(self, error: Exception) -> Failure:
        return Failure(_status(error) is not None, _may_pass(error), _reason(error))

    def _failed(self, what: str, error: Exception, failure: Failure, again: str) -> StoreIOError:
        text = str(error)
        if "NoSuchBucket" in text:
            return StoreIOError(
                f'{what}: there is no bucket "{self.place.bucket}" at '
                f"{_endpoint()}. Make it, or name another with gradstore=s3://BUCKET/PREFIX"
            )
        if "latest/api/token" in text or "latest/meta-data" in text:
            return StoreIOError(f"{what}: no credentials were found; {_HOW}")
        if "RequestTimeTooSkewed" in text:
            return StoreIOError(
                f"{what}: {failure.reason}. This machine's clock is minutes off, or the server's: "
                "set it (`timedatectl` says whether it is kept right), then run again"
            )
        status = _status(error)
        if status in (401, 403):
            return StoreIOError(
                f"{what}: {failure.reason}. See that the credentials may read, write, list and "
                f"delete below {self.place}; {_HOW}"
            )
        return StoreIOError(
            f"{what} at {_endpoint()}: {failure.reason}{again}. See that the server is well, then "
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
