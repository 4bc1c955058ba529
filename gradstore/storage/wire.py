"""Words that a service and its clients share, of keys, paths and headers."""

from __future__ import annotations

import base64
import hashlib
import os
import re

from gradstore.errors import BadInput
from gradstore.storage.location import ObjectPath

#: Environment variables of the key that reads, and of the one that writes, and reads too.
READ_KEY, WRITE_KEY = "GRADSTORE_TOKEN", "GRADSTORE_WRITE_TOKEN"

#: Where a service has the files of its store, what removes several, and what copies one.
FILES, REMOVALS, COPIES = "/v1/files", "/v1/removals", "/v1/copies"

#: Header of every answer of a service, by which it is known: bytes of the largest body that it
#: takes, 0 where it takes none.
MARK = "Gradstore-Most-Bytes"

#: Header by which a writer says which of the lock's holders it is.
WRITER = "Gradstore-Writer"


def content_digest(data: bytes | memoryview) -> str:
    """Return the value of the field Content-Digest (RFC 9530) for some bytes.

    >>> content_digest(b"")
    'sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:'
    """
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def key_for(place: ObjectPath) -> str:
    """Return the key of this process, the one that writes if there is one.

    Raises:
        BadInput: there is none, or it can't be sent.
    """
    name = WRITE_KEY if os.environ.get(WRITE_KEY) else READ_KEY
    key = os.environ.get(name, "")
    if not key:
        raise BadInput(
            f'store "{place}" needs a key, which `gradstore serve` was started with or printed: '
            f"set {READ_KEY} to read, or {WRITE_KEY} to write"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise BadInput(f"{name} holds characters that no key has; set it to the service's key")
    return key
