"""Keys of a server: one that reads, and one that writes too; from the environment, or new."""

from __future__ import annotations

import os
import secrets

from gradstore.errors import BadInput
from gradstore.storage.wire import READ_KEY, WRITE_KEY

#: Shortest key that is taken.
KEY_CHARACTERS = 16


def own_token(name: str = READ_KEY) -> str:
    """Return a key of this start: what the environment gives, else a new one.

    Args:
        name: environment variable that fixes it, for scripts.

    Raises:
        BadInput: the one given is too short, or can't stand in an address.
    """
    given = os.environ.get(name)
    if given is None:
        return secrets.token_urlsafe(24)
    if len(given) < KEY_CHARACTERS or not given.replace("-", "").replace("_", "").isalnum():
        raise BadInput(f"{name} has {len(given)} characters; give at least {KEY_CHARACTERS} "
                       "letters, digits, - or _, or unset it.")  # fmt: skip
    return given


def both_keys() -> tuple[str, str]:
    """Return the key that reads and the one that writes.

    Raises:
        BadInput: they are the same, or one of them is no key.
    """
    read, write = own_token(READ_KEY), own_token(WRITE_KEY)
    if read == write:
        raise BadInput(f"{READ_KEY} and {WRITE_KEY} are the same; whoever may read could write. "
                       "Give two keys, or unset one.")  # fmt: skip
    return read, write
