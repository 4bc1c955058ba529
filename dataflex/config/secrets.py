"""Secrets: keys and passwords, which no message, log or file of ours may show.

Files are written without the values of keys whose names say that they are secret. Messages and
tracebacks hold text from elsewhere (a server, a library), so there the known values are replaced.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from numbers import Number
from typing import Any
from urllib.parse import quote, quote_plus

#: Stands where a secret was.
HIDDEN = "***"

#: Names of keys with secret values: `hf_hub_token`, `swanlab_api_key`, `X-Api-Key`, `password`; not
#: `eos_token` or `add_tokens`.
_SECRET = re.compile(
    r"(?:token|(?:.*[-_])?(?:passwords?|passwd|passphrase|secrets?|webhook_url|credentials?|"
    r"authorization|bearer|(?:api|access|secret|private|judge|auth|account|signing)[-_]?keys?|"
    r"(?:hub|api|access|auth|bearer|judge)[-_]?tokens?))",
    re.IGNORECASE,
)

#: What stands before the secret in the value of an Authorization header.
_SCHEME = re.compile(r"(?:bearer|basic|token)\s+(\S.*)", re.IGNORECASE)

#: A key and its value in text that may be no sound YAML, JSON or `key=value`.
_WRITTEN = re.compile(r"""["']?([A-Za-z_][\w-]*)["']?\s*[:=]\s*([^\s,][^\n]*)""")

#: The name of an environment variable may be shown where a secret was expected.
_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")

#: A shorter one is no secret, and replacing it would spoil any message.
_SHORTEST = 4

_kept: set[str] = set()


def is_variable(text: str) -> bool:
    """Return true for a text in the form of an environment variable's name, `JUDGE_KEY`."""
    return _VARIABLE.fullmatch(text) is not None


def without_secrets(value: Any) -> Any:  # noqa: ANN401 - YAML values
    """Return a copy in which texts under secret names are replaced, at any depth.

    A path or a date there, which a file keeps as text, is replaced, too.
    """
    return _replaced(value, under=False)


def _replaced(value: Any, under: bool) -> Any:  # noqa: ANN401 - YAML values
    """Replace the texts in a value that has a secret name, or is `under` one, and look deeper."""
    if isinstance(value, Mapping):
        return {key: _replaced(inner, under or _is_named(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_replaced(inner, under) for inner in value)
    return HIDDEN if under and _is_secret(value) else value


def keep_secrets(value: Any, under: bool = False) -> None:  # noqa: ANN401 - YAML values
    """Know the texts under secret names, at any depth, so that `redacted` replaces them.

    Args:
        value: of a configuration.
        under: true where its own name is secret.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            keep_secrets(inner, under or _is_named(key))
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            keep_secrets(inner, under)
    elif under and _is_secret(value):
        keep_secret(str(value))


def keep_secret(text: str) -> None:
    """Know a secret, so that `redacted` replaces it for as long as the process lives."""
    bare = _SCHEME.fullmatch(text.strip())
    for known in (text.strip(), *(bare.groups() if bare is not None else ())):
        if len(known) >= _SHORTEST:
            _kept.add(known)


def keep_written_secrets(text: str) -> None:
    """Know the values under secret names in text that is yet to be parsed, and may not parse.

    A parser's complaint quotes the line that it stopped at.
    """
    for key, written in _WRITTEN.findall(text):
        value = written.strip().strip("\"'")
        if not _is_named(key) or not _is_secret(value):
            continue
        keep_secret(written)
        keep_secret(value)
        if value[0] in "[{":  # a complaint may quote one of several
            for part in re.split(r"[\s,\[\]{}\"']+", value):
                if part not in ("null", "true", "false"):
                    keep_secret(part)


def redacted(text: str) -> str:
    """Replace every known secret, also where it is quoted or escaped."""
    for secret in sorted(_kept, key=len, reverse=True):
        quoted = (quote(secret, safe=""), quote(secret), quote_plus(secret))
        escaped = (json.dumps(secret)[1:-1], repr(secret)[1:-1], html.escape(secret))
        for form in sorted({secret, *quoted, *escaped}, key=len, reverse=True):
            text = text.replace(form, HIDDEN)
    return text


def _is_named(key: object) -> bool:
    """Return whether a key's name says that its value is secret."""
    return isinstance(key, str) and _SECRET.fullmatch(key) is not None


def _is_secret(value: object) -> bool:
    """Return whether a value under a secret name is a secret: text, no variable's name or number.

    What YAML or JSON has no scalar for, as a path or a date, is written as text.
    """
    if value is None or isinstance(value, Number):
        return False
    text = str(value)
    return bool(text) and not is_variable(text)
