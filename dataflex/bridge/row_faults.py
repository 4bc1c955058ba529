"""Rows that LlamaFactory cannot take, or drops with a line each: which they are, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dataflex.data.rows import SOURCE_ROW
from gradstore.errors import BadInput

#: Reasons why a row is dropped -> what its rows have in common.
REASONS = {
    "no_response": "no response",
    "response_not_text": "a response that is not text",
    "roles": "turns out of order, or of unknown roles",
    "several_responses": "several responses",
    "too_long": "more than cutoff_len tokens",
    "other": "another fault",
}

#: Reasons why a row is dropped -> what to do.
REMEDIES = {
    "no_response": "give each row a response (columns.response in dataset_info.json names where)",
    "response_not_text": 'write each response as text, in quotes ("42")',
    "roles": "let turns take turns, the user's first, with the roles that tags in "
    "dataset_info.json name",
    "several_responses": "give each row one response",
    "too_long": "raise cutoff_len",
    "other": "compare a row with LlamaFactory's data formats",
}

#: Row numbers by reason, of one data set.
Dropped = dict[str, list[int]]


@dataclass
class ReadRows:
    """Data sets on their way through LlamaFactory's loader, by name.

    Attributes:
        files: rows with every column of their file, and their number.
        aligned: the same rows as prompt and response, in the same order.
        attributes: LlamaFactory's DatasetAttr.
        unnumbered: those whose numbers do not go with their rows, which `tokenized_path` keeps as
            LlamaFactory makes them; None in itself.
    """

    files: dict[str, Any] = field(default_factory=dict)
    aligned: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    unnumbered: ReadRows | None = None

    def add(self, name: str, file: Any, aligned: Any, attributes: Any) -> None:  # noqa: ANN401
        """Add a data set."""
        self.files[name], self.aligned[name], self.attributes[name] = file, aligned, attributes


@contextmanager
def misfit_told(dataset: Any, attributes: Any, data_args: Any) -> Iterator[None]:  # noqa: ANN401
    """Name the first row that LlamaFactory's converter cannot take, where it raises.

    Raises:
        BadInput: in the place of what it raises.
    """
    try:
        yield
    except Exception as error:  # of any kind: a row that the converter's code did not expect
        if reason := _misfit(dataset, attributes, data_args):
            raise BadInput(reason) from error
        raise


def _misfit(dataset: Any, attributes: Any, data_args: Any) -> str | None:  # noqa: ANN401
    """Find the first row that LlamaFactory's converter cannot take; None if it takes all."""
    from llamafactory.data.converter import get_dataset_converter

    convert = get_dataset_converter(attributes.formatting, attributes, data_args)
    for i, row in enumerate(dataset):
        try:
            convert(row)
        except KeyError as error:
            return f"a row has no {error}: row {i}, with the columns {', '.join(map(str, row))}."
        except Exception as error:  # of any kind, as above
            return (
                f"row {i} is not in the format {attributes.formatting!r} with columns as "
                f"dataset_info.json says ({type(error).__name__}: {error})."
            )
    return None


def find_dropped(
    read: ReadRows, name: str, kept: Iterable[int], cutoff_applies: bool
) -> Dropped:  # fmt: skip
    """Find the rows of a data set that are not among the processed ones, by reason.

    Args:
        read: the data sets as they were read.
        name: which one.
        kept: positions in the file of the rows that are left.
        cutoff_applies: whether rows above `cutoff_len` are dropped (in packing), not cut.
    """
    if name not in read.aligned:
        return {}
    left, found = set(kept), Dropped()
    file, aligned = read.files[name], read.aligned[name]
    for i, number in enumerate(file[SOURCE_ROW][:]):
        if number not in left:
            left.add(number)  # `num_samples` may take a row several times
            reason = _reason(aligned[i], file[i], read.attributes[name], cutoff_applies)
            found.setdefault(reason, []).append(int(number))
    return found


def find_faulty(read: ReadRows, name: str) -> Dropped:
    """Find the rows of a data set that are dropped for their turns, by reason.

    It is all that LlamaFactory drops without packing, and needs no list of those that are left.
    """
    found = find_dropped(read, name, (), cutoff_applies=False)
    found.pop("other", None)
    return found


def told(name: str, dropped: Dropped, total: int) -> str:
    """Say in one line which rows of a data set were dropped."""
    parts = [
        f"{len(rows)} with {REASONS[reason]} (row {', '.join(map(str, rows[:3]))}"
        f"{', ...' if len(rows) > 3 else ''})"
        for reason, rows in dropped.items()
    ]
    count = sum(map(len, dropped.values()))
    return f"data set {name!r}: {count} of {total} rows are not used: {'; '.join(parts)}"


def remedy(dropped: Dropped) -> str:
    """Say what to do about the reason by which most rows of a data set were dropped."""
    return REMEDIES[max(dropped, key=lambda reason: len(dropped[reason]))]


def _reason(
    aligned: Mapping[str, Any], row: Mapping[str, Any], attributes: Any, cutoff_applies: bool  # noqa: ANN401
) -> str:  # fmt: skip
    """Give the key of `REASONS` for one dropped row."""
    prompt, response = aligned["_prompt"], aligned["_response"]
    if not response and attributes.formatting == "alpaca":
        said = row.get(attributes.response) if attributes.response else None
        return "no_response" if said is None or said == "" else "response_not_text"
    if not response and not prompt:
        messages = row.get(attributes.messages)
        return "roles" if messages else "no_response"
    if len(response) > 1:
        return "several_responses"
    if len(prompt) % 2 != 1:
        return "roles"
    return "too_long" if cutoff_applies else "other"
