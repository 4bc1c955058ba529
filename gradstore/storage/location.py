"""The place of a store: a folder, a bucket and a prefix in it, or a service that has the store.

>>> place = location("s3://bucket/runs/a")
>>> place, str(place / "commits/1.json")
(ObjectPath(bucket='bucket', key='runs/a'), 's3://bucket/runs/a/commits/1.json')
>>> location("https://store.example.org/team").parts
('store.example.org', 'team')
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from gradstore.errors import BadInput, expect

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
#: `Path("s3://b/p")` has lost a slash; no folder is called `s3:`.
_OBJECTS = re.compile(r"s3:/{1,2}(?P<bucket>[^/]*)(?P<key>(?:/.*)?)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
#: A service's host, with its port, and the path under which a proxy has it.
_SERVICE = re.compile(r"(?P<scheme>https?):/{1,2}(?P<host>[^/]*)(?P<key>(?:/.*)?)", re.DOTALL)
_HOST = re.compile(r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])"
                   r"(?::[0-9]{1,5})?")  # fmt: skip
_PART = re.compile(r"[A-Za-z0-9_=@+-][A-Za-z0-9._=@+-]*")


#: Names of this machine for itself.
LOOPBACK = ("127.0.0.1", "localhost", "::1")

#: Forms of a place that is not a folder, for messages.
ADDRESSES = "s3://BUCKET/PREFIX or https://HOST"


@dataclass(frozen=True)
class ObjectPath:
    """A place in a bucket, or of a service that has one store.

    Attributes:
        bucket: name of the bucket; of a service its host and port.
        key: names joined by slashes, "" for the bucket itself.
        scheme: s3; https, or http, of a service.
    """

    bucket: str
    key: str = ""
    scheme: str = field(default="s3", repr=False)

    def __str__(self) -> str:
        return "/".join((f"{self.scheme}:/", *self.parts))

    def __truediv__(self, below: str) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{below}" if self.key else below, self.scheme)

    @property
    def is_service(self) -> bool:
        """True of a service, which keeps a store, False of a bucket, which keeps objects."""
        return self.scheme != "s3"

    @property
    def parts(self) -> tuple[str, ...]:
        """The bucket, and each name after it."""
        return (self.bucket, *(part for part in self.key.split("/") if part))


Location: TypeAlias = Path | ObjectPath

#: What a caller may give for one.
Place: TypeAlias = str | os.PathLike[str] | ObjectPath


def is_address(text: str) -> bool:
    """Tell whether a text is an address, `scheme://...`, and no path.

    >>> is_address("s3://bucket/a"), is_address("runs/a:b"), is_address("C:/runs")
    (True, False, False)
    """
    return _SCHEME.match(text) is not None


def location(place: Place) -> Location:
    """Tell a folder from a place in a bucket, `s3://bucket/prefix`, and from a service.

    Raises:
        BadInput: it is no path; an address of another kind; a bucket or prefix that cannot be; or
            a service that would be told its key in the clear.
    """
    if isinstance(place, ObjectPath):
        return place
    expect(isinstance(place, str | os.PathLike), "the store", place, f"a path, or {ADDRESSES}")
    text = os.fspath(place)
    if service := _SERVICE.fullmatch(text):
        return _service(text, service)
    found = _OBJECTS.fullmatch(text)
    if found is None:
        if scheme := _SCHEME.match(text):
            raise BadInput(
                f"the store is {text!r}, and {scheme[1]}:// is not known; give a folder, or "
                f"{ADDRESSES} (AWS_ENDPOINT_URL names the server of a bucket)"
            )
        return Path(place)
    if not _BUCKET.fullmatch(found["bucket"]):
        raise BadInput(
            f"the store is {text!r}: {found['bucket']!r} is no name of a bucket (3 to 63 of a-z, "
            "0-9, . and -); give s3://BUCKET/PREFIX"
        )
    return ObjectPath(found["bucket"], _prefix(text, found["key"]))


def _service(text: str, found: re.Match[str]) -> ObjectPath:
    """Check the address of a service."""
    host = _HOST.fullmatch(found["host"])
    if host is None:
        shown = re.sub(r"//?[^/]*@", "//***@", text)
        raise BadInput(
            f"the store is {shown!r}, which names no host; give https://HOST or https://HOST:PORT, "
            "and the key by GRADSTORE_TOKEN or GRADSTORE_WRITE_TOKEN"
        )
    if found["scheme"] == "http" and host["name"].strip("[]").lower() not in LOOPBACK:
        raise BadInput(
            f"the store is {text!r}: over http:// its key could be read on the way. Give https:// "
            "(a reverse proxy before the service), or a tunnel's end, http://127.0.0.1:PORT"
        )
    return ObjectPath(found["host"].lower(), _prefix(text, found["key"]), found["scheme"])


def _prefix(text: str, path: str) -> str:
    """Check the names after a bucket or a host."""
    key = path.strip("/")
    for part in key.split("/") if key else ():
        if not _PART.fullmatch(part):
            raise BadInput(
                f"the store is {text!r}: {part!r} can't be part of a prefix; give names of "
                "letters, digits and ._=@+- between slashes"
            )
    return key


def at_user_home(text: str) -> Location:
    """Return the place that a word of a user's names; `~/` is the user's home folder."""
    found = location(text)
    return found.expanduser() if isinstance(found, Path) else found
