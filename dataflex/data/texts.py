"""Text of processed rows for people: their own messages, or else their decoded tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.data.rows import SOURCE_ROW, Rows
from gradstore.errors import BadInput
from gradstore.export.token_rows import decoded
from gradstore.format.text_table import Text

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 1024


class RowsText:
    """Prompt and response of each of n processed rows, read when they are asked for.

    A row whose origin is known is shown as its data set has it: the content of a lone request, else
    each turn after its role. Of any other (packed, from `tokenized_path`, of stage pt) the tokens
    are decoded: the response is what has labels, the prompt what has none.
    """

    def __init__(
        self,
        rows: Rows,
        files: Mapping[str, Dataset],
        messages: Mapping[str, Dataset],
        tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    ) -> None:
        """Take the rows.

        Args:
            rows: n processed rows.
            files: data set name -> its rows with every column they have.
            messages: data set name -> the same rows as LlamaFactory aligned them.
            tokenizer: decodes the others.
        """
        self._rows, self._files, self._messages = rows, files, messages
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Text]:
        """Give the text of every row, in order."""
        for start in range(0, len(self), _CHUNK):
            yield from self.read(range(start, min(start + _CHUNK, len(self))))

    def read(self, rows: Sequence[int] | np.ndarray) -> list[Text]:
        """Read the text of some rows, in the order asked for.

        Args:
            rows: positions from 0 to n - 1.

        Raises:
            BadInput: a position that there is not.
        """
        wanted = [int(row) for row in rows]
        if outside := [row for row in wanted if not 0 <= row < len(self)]:
            raise BadInput(f"row {outside[0]} requested, the set has rows 0 to {len(self) - 1}")
        found: dict[int, tuple[str, str, str | None]] = {}
        by_set: dict[str, dict[int, int]] = {}  # data set -> row -> place among its messages
        for row in set(wanted):
            name, number = (None, None) if not self._rows.sources else self._rows.sources[row]
            place = self._places.get(name, {}).get(number) if name is not None else None
            if name is not None and place is not None:
                by_set.setdefault(name, {})[row] = place
        for name, places in by_set.items():
            told = _rows_at(self._messages[name], list(places.values()))
            originals = _rows_at(self._files[name], list(places.values()))
            for row, messages, raw in zip(places, told, originals, strict=True):
                found[row] = (*_told(messages), _as_json(raw))
        decoded = sorted(set(wanted) - set(found))
        if decoded:
            found |= zip(decoded, self._decoded(decoded), strict=True)
        texts = []
        for row in wanted:
            prompt, response, original = found[row]
            texts.append(Text(prompt, response, int(self._rows.lengths[row]), original))
        return texts

    @cached_property
    def _places(self) -> dict[str | None, dict[Any, int]]:
        """Place of each row of a file among the aligned ones."""
        return {
            name: {number: place for place, number in enumerate(dataset[SOURCE_ROW][:])}
            for name, dataset in self._messages.items()
        }

    def _decoded(self, rows: Sequence[int]) -> list[tuple[str, str, None]]:
        columns = self._rows.dataset[list(rows)]
        ids = columns["input_ids"]
        pairs = zip(ids, columns.get("labels", ids), strict=True)
        return [(*decoded(self._tokenizer, row, labels), None) for row, labels in pairs]


def _rows_at(dataset: Dataset, places: list[int]) -> list[dict[str, Any]]:
    columns: dict[str, list[Any]] = dataset[places]
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _as_json(row: Mapping[str, Any]) -> str | None:
    """Spell a row of a file; None where a value (a picture, a date) has no JSON."""
    own = {column: value for column, value in row.items() if column != SOURCE_ROW}
    try:
        return json.dumps(own, ensure_ascii=False)
    except (TypeError, ValueError):
        return None


def _told(row: Mapping[str, Any]) -> tuple[str, str]:
    """Give prompt and response of an aligned row."""
    turns = [(str(turn["role"]), _content(turn)) for turn in row.get("_prompt") or ()]
    answer = "\n".join(_content(turn) for turn in (row.get("_response") or ())[:1])
    before = [(role, text) for role, text in (("system", row.get("_system")),
                                              ("tools", row.get("_tools"))) if text]  # fmt: skip
    said = [*before, *turns]
    if len(said) == 1 and not before:
        return said[0][1], answer
    return "\n".join(f"{role}: {text}" for role, text in said), answer


def _content(turn: Mapping[str, Any]) -> str:
    content = turn["content"]
    return content if isinstance(content, str) else str(content)
