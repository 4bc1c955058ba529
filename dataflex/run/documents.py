"""Reading the JSON files of runs and checkpoints: sound and as expected, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from gradstore.errors import DamagedData

T = TypeVar("T")

#: Characters of a wrong value that a message shows.
_SHOWN = 60


def read_document(path: Path, shape: type[T], instead: str) -> T:
    """Read a JSON file into a dataclass; fields that it does not declare are let through.

    Types are strict: text is no number, and a list becomes a tuple where one is declared.

    Args:
        path: the file.
        shape: what it must hold.
        instead: the next step, for the message.

    Raises:
        FileNotFoundError: it is not there.
        DamagedData: it is no JSON, nests too deeply, or a field has another type or a value out of
            its limits.
    """
    try:
        return TypeAdapter(shape).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise DamagedData(f"{path} is damaged: {_told(error)}. {instead}") from error


def _told(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    reason = str(first["msg"])
    reason = reason[:1].lower() + reason[1:]
    if first["type"] == "missing":
        return f"it has no {field}"
    if not field:
        return reason
    return f"{field} is {_shown(first['input'])} ({reason})"


def _shown(value: Any) -> str:  # noqa: ANN401 - any JSON value
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
