"""The place of a store: a folder, or a bucket and a prefix in it.

>>> place = location("s3://bucket/runs/a")
>>> place, str(place / "commits/1.json")
(ObjectPath(bucket='bucket', key='runs/a'), 's3://bucket/runs/a/commits/1.json')
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gradstore.errors import BadInput, expect

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
#: `Path("s3://b/p")` has lost a slash; no folder is called `s3:`.
_OBJECTS = re.compile(r"s3:/{1,2}(?P<bucket>[^/]*)(?P<key>(?:/.*)?)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PART = re.compile(r"[A-Za-z0-9_=@+-][A-Za-z0-9._=@+-]*")


@dataclass(frozen=True)
class ObjectPath:
    """A place in a bucket.

    Attributes:
        bucket: name of the bucket.
        key: names joined by slashes, "" for the bucket itself.
    """

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return "/".join(("s3:/", *self.parts))

    def __truediv__(self, below: str) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{below}" if self.key else below)

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
    """Tell a folder from a place in a bucket, `s3://bucket/prefix`.

    Raises:
        BadInput: it is no path; an address of another kind; or a bucket or prefix that cannot be.
    """
    if isinstance(place, ObjectPath):
        return place
    expect(
        isinstance(place, str | os.PathLike), "the store", place, "a path, or s3://BUCKET/PREFIX"
    )
    text = os.fspath(place)
    found = _OBJECTS.fullmatch(text)
    if found is None:
        if scheme := _SCHEME.match(text):
            raise BadInput(
                f"the store is {text!r}, and {scheme[1]}:// is not known; give a folder, or "
                "s3://BUCKET/PREFIX (AWS_ENDPOINT_URL names the server)"
            )
        return Path(place)
    key = found["key"].strip("/")
    if not _BUCKET.fullmatch(found["bucket"]):
        raise BadInput(
            f"the store is {text!r}: {found['bucket']!r} is no name of a bucket (3 to 63 of a-z, "
            "0-9, . and -); give s3://BUCKET/PREFIX"
        )
    for part in key.split("/") if key else ():
        if not _PART.fullmatch(part):
            raise BadInput(
                f"the store is {text!r}: {part!r} can't be part of a prefix; give names of "
                "letters, digits and ._=@+- between slashes"
            )
    return ObjectPath(found["bucket"], key)


def at_user_home(text: str) -> Location:
    """Return the place that a word of a user's names; `~/` is the user's home folder."""
    found = location(text)
    return found.expanduser() if isinstance(found, Path) else found
