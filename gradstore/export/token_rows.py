"""Rows of a script of one's own as tokens and labels, whatever form they come in.

A row is tokens (`input_ids`, and `labels` where some tokens are no targets), or a pair of texts
(`prompt`, `response`) for a tokenizer, or whatever a collator takes: then a row's tokens and labels
are those of the batch that the collator makes of it alone.

Letters: n rows, b rows of a batch, t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.capture.losses import IGNORED_LABEL
from gradstore.errors import BadInput, expect
from gradstore.format.records import RowSet, row_hash

#: Entries of a collator's batch that say nothing more of a row than its tokens and labels do.
_KNOWN = frozenset({"input_ids", "labels", "attention_mask", "position_ids", "token_type_ids",
                    "completion_mask", "assistant_masks", "num_items_in_batch"})  # fmt: skip

_FORMS = (
    "give each row input_ids (and labels), or prompt and response with a tokenizer, or a collator "
    "that takes rows as they are"
)


@dataclass(frozen=True)
class TokenRows:
    """Rows as the model sees them.

    Attributes:
        name: of the set, for messages and for the store.
        input_ids: (n,) lists of token ids.
        labels: (n,) lists of as many labels; -100 where a token is no target.
        texts: (n,) pairs of prompt and response, where the rows came as texts.
    """

    name: str
    input_ids: Sequence[list[int]]
    labels: Sequence[list[int]]
    texts: Sequence[tuple[str, str]] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def items(self) -> list[dict[str, list[int]]]:
        """(n,) what `padded` takes a list of."""
        pairs = zip(self.input_ids, self.labels, strict=True)
        return [{"input_ids": ids, "labels": labels} for ids, labels in pairs]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) tokens of each row."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)

    @cached_property
    def row_set(self) -> RowSet:
        """Hashes and sources, in order."""
        hashes = [row_hash(*pair) for pair in zip(self.input_ids, self.labels, strict=True)]
        return RowSet.from_hashes(hashes, [(self.name, i) for i in range(len(self))])


def read_rows(name: str, rows: Any, by: Any) -> TokenRows:  # noqa: ANN401 - of the user's own
    """Read rows of any of the forms above.

    Args:
        name: of the set.
        rows: n rows that have a length and are indexed.
        by: a tokenizer, a collator (rows -> batch of tensors (b, t)), or None for tokens alone.

    Raises:
        BadInput: there is no row, none with a target token, or one that cannot be read; names the
            set and the row.
    """
    sized = hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not isinstance(rows, str)
    expect(sized, f"the rows of {name!r}", rows, "a list, or a data set with a length")
    read = _reader(by)
    found, texts = [], []
    for i in range(len(rows)):
        ids, labels, text = read(rows[i], f"{name!r}, row {i}")
        found.append((ids, labels))
        texts.append(text)
    # The first token is never predicted: its label does not count.
    if not any(label != IGNORED_LABEL for _, labels in found for label in labels[1:]):
        raise BadInput(
            f"{name!r} has {len(found)} rows and none with a target token (a label other than "
            f"{IGNORED_LABEL} after the first token): nothing could be learned from it. Check the "
            "rows and their labels."
        )
    kept = [text for text in texts if text is not None]
    return TokenRows(name, [ids for ids, _ in found], [labels for _, labels in found],
                     kept if len(kept) == len(found) else None)  # fmt: skip


def padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Right-pad rows to a batch: `input_ids`, `labels` and `attention_mask` (b, t)."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(lists: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*one, *[filler] * (width - len(one))] for one in lists])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], IGNORED_LABEL),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def decoded(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> tuple[str, str]:  # noqa: ANN401
    """Decode the tokens that are no targets, the prompt, and those that are, the response."""
    learned = [label != IGNORED_LABEL for label in labels]
    parts = ([token for token, yes in zip(ids, learned, strict=True) if yes is wanted]
             for wanted in (False, True))  # fmt: skip
    prompt, response = (
        str(tokenizer.decode(part, skip_special_tokens=True)).strip() for part in parts
    )
    return prompt, response


def tokenizer_of(by: Any) -> Any:  # noqa: ANN401 - a tokenizer, a collator or None
    """Return the tokenizer that is given, or that a collator holds; None where there is none."""
    if _is_tokenizer(by):
        return by
    return next((each for each in (getattr(by, "tokenizer", None),) if _is_tokenizer(each)), None)


_Row = tuple[list[int], list[int], tuple[str, str] | None]


def _reader(by: Any) -> Callable[[Any, str], _Row]:  # noqa: ANN401
    if by is None or _is_tokenizer(by):
        return lambda row, where: _of_mapping(row, where, by)
    if getattr(by, "mlm", False):
        raise BadInput(
            "the collator masks tokens at random (mlm=True): a row has no labels of its own. Set "
            "mlm=False."
        )
    expect(callable(by), "tokenizer_or_collator", by, "a tokenizer, or rows -> batch")
    return lambda row, where: (*_collated(by, row, where), None)


def _is_tokenizer(it: object) -> bool:
    return hasattr(it, "convert_ids_to_tokens") and callable(it)


def _of_mapping(row: Any, where: str, tokenizer: Any) -> _Row:  # noqa: ANN401
    expect(isinstance(row, Mapping), where, row, f"a mapping: {_FORMS}")
    if "input_ids" in row:
        ids = _whole(row["input_ids"], f"{where}, input_ids")
        labels = _whole(row["labels"], f"{where}, labels") if "labels" in row else list(ids)
        _check_lengths(ids, labels, where)
        return ids, labels, None
    texts = row.get("prompt"), row.get("response")
    if tokenizer is None or not all(isinstance(text, str) for text in texts):
        raise BadInput(f"{where} has {', '.join(map(str, row)) or 'nothing'}: {_FORMS}.")
    ids, labels = _tokenised(tokenizer, *texts)
    _check_lengths(ids, labels, where)
    return ids, labels, texts


def _tokenised(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:  # noqa: ANN401
    """Put the answer's tokens behind the prompt's; they alone are targets.

    With a chat template the pair is one user's and one assistant's message; without one, the texts
    as they are, then the end-of-sequence token.
    """
    if getattr(tokenizer, "chat_template", None):
        asked = [{"role": "user", "content": prompt}]
        whole = [*asked, {"role": "assistant", "content": response}]
        texts = [
            tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=each is asked)
            for each in (asked, whole)
        ]
        if not texts[1].startswith(texts[0]):
            raise BadInput(
                "the tokenizer's chat template writes a prompt otherwise once it is answered, so "
                "that the answer's tokens can't be told from it: give rows with input_ids and "
                "labels."
            )
        prompt, response, begins, ends = texts[0], texts[1][len(texts[0]) :], False, []
    else:
        end = getattr(tokenizer, "eos_token_id", None)
        begins, ends = True, [] if end is None else [end]
    first = list(tokenizer(prompt, add_special_tokens=begins)["input_ids"])
    answer = list(tokenizer(response, add_special_tokens=False)["input_ids"]) + ends
    return first + answer, [IGNORED_LABEL] * len(first) + answer


def _collated(collate: Any, row: Any, where: str) -> tuple[list[int], list[int]]:  # noqa: ANN401
    """Read the tokens and labels of the batch that a collator makes of one row."""
    batch = collate([dict(row) if isinstance(row, Mapping) else row])
    expect(isinstance(batch, Mapping), f"{where}, collated,", batch, "a mapping of tensors")
    tensors = {key for key, value in batch.items() if isinstance(value, Tensor)}
    more = sorted(key for key in tensors - _KNOWN if not key.startswith(("cu_seq", "max_length")))
    if more:
        raise BadInput(
            f"{where} has {', '.join(more)} beside its tokens: features are taken of rows of text. "
            "Leave it out, or compute units of your own (gradstore.compute_unit)."
        )
    for key in ("input_ids", "labels"):
        shape = getattr(batch.get(key), "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != 1:
            raise BadInput(
                f"{where}: the collator gives {key} {'none' if shape is None else tuple(shape)}, "
                "expected (1, tokens). Give rows and a collator for language modelling."
            )
    mask = batch.get("attention_mask")
    own = torch.ones_like(batch["input_ids"]) if getattr(mask, "dim", int)() != 2 else mask
    _check_single(batch, where)
    ids, labels = (batch[key][0][own[0] != 0].tolist() for key in ("input_ids", "labels"))
    _check_lengths(ids, labels, where)
    return ids, labels


def _check_single(batch: Mapping[str, Any], where: str) -> None:
    """Refuse several samples in one row: positions that begin again tell them."""
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        begins = int((positions[0][1:] == 0).sum())
        if begins and "attention_mask" not in batch:
            raise BadInput(
                f"{where} holds {begins + 1} packed samples: a row's features would be those of "
                "all of them. Set packing=False."
            )


def _whole(values: Any, what: str) -> list[int]:  # noqa: ANN401 - a list, an array or a tensor
    """Return whole numbers (t,) as a list."""
    found = np.asarray(values)
    fits = found.ndim == 1 and (found.dtype.kind in "iu" or found.size == 0)
    expect(fits, what, values, "whole numbers (tokens,)")
    return [int(value) for value in found.tolist()]


def _check_lengths(ids: Sequence[int], labels: Sequence[int], where: str) -> None:
    if not ids or len(ids) != len(labels) or min(ids) < 0:
        raise BadInput(
            f"{where} has {len(ids)} tokens{' below 0' if ids and min(ids) < 0 else ''} and "
            f"{len(labels)} labels: give at least one token, and a label for each."
        )
