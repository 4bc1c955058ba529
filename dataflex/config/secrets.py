"""Secrets: keys and passwords, which no message, log or file of ours may show.

Files are written without the values of keys whose names say that they are secret. Messages and
tracebacks hold text from elsewhere (a server, a library), so there the known values are replaced.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus

#: Stands where a secret was.
HIDDEN = "***"

#: Names of keys with secret values: `hf_hub_token`, `swanlab_api_key`, `password`; not `eos_token`.
_SECRET = re.compile(
    r"(?:token|(?:.*_)?(?:password|passwd|secret|webhook_url|(?:api|access|secret|private)_?key|"
    r"(?:hub|api|access|auth|bearer)_?token))",
    re.IGNORECASE,
)

#: A key and its value in text that may be no sound YAML, JSON or `key=value`.
_WRITTEN = re.compile(r"""["']?([A-Za-z_]\w*)["']?\s*[:=]\s*([^\s,][^\n]*)""")

#: The name of an environment variable may be shown where a secret was expected.
_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")

#: A shorter one is no secret, and replacing it would spoil any message.
_SHORTEST = 4

_kept: set[str] = set()


def is_variable(text: str) -> bool:
    """Return true for a text in the form of an environment variable's name, `JUDGE_KEY`."""
    return _VARIABLE.fullmatch(text) is not None


def without_secrets(value: Any) -> Any:  # noqa: ANN401 - YAML values
    """Return a copy in which texts under secret names are replaced, at any depth."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if _is_secret(key, inner) else without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(map(without_secrets, value))
    return value


def keep_secrets(value: Any) -> None:  # noqa: ANN401 - YAML values
    """Know the texts under secret names, at any depth, so that `redacted` replaces them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if _is_secret(key, inner):
                keep_secret(inner)
            else:
                keep_secrets(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            keep_secrets(inner)


def keep_secret(text: str) -> None:
    """Know a secret, so that `redacted` replaces it for as long as the process lives."""
    if len(text.strip()) >= _SHORTEST:
        _kept.add(text.strip())


def keep_written_secrets(text: str) -> None:
    """Know the values under secret names in text that is yet to be parsed, and may not parse.

    A parser's complaint quotes the line that it stopped at.
    """
    for key, written in _WRITTEN.findall(text):
        value = written.strip().strip("\"'")
        if _is_secret(key, value):
            keep_secret(written)
            keep_secret(value)


def redacted(text: str) -> str:
    """Replace every known secret, also where it is quoted or escaped."""
    for secret in sorted(_kept, key=len, reverse=True):
        quoted = (quote(secret, safe=""), quote(secret), quote_plus(secret))
        escaped = (json.dumps(secret)[1:-1], repr(secret)[1:-1], html.escape(secret))
        for form in sorted({secret, *quoted, *escaped}, key=len, reverse=True):
            text = text.replace(form, HIDDEN)
    return text


def _is_secret(key: object, value: object) -> bool:
    named = isinstance(key, str) and _SECRET.fullmatch(key) is not None
    return named and isinstance(value, str) and bool(value) and not is_variable(value)
