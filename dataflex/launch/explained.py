"""Answers of an `Explainer`: rows that helped and hurt, and one pair taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import IGNORED
from dataflex.features.question_rows import token_texts

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.scoring.contributions import Contributions
    from gradstore.store.generation import Generation
    from gradstore.store.texts import RowTexts


@dataclass(frozen=True)
class FoundRow:
    """A training row of an answer.

    Attributes:
        rank: from 1, on its side.
        row: position in the processed data set.
        score: its influence on the query.
        source: data set and index in its file; None where the store does not know.
        prompt: its text; None where the store keeps none.
        response: likewise.
    """

    rank: int
    row: int
    score: float
    source: tuple[str, int] | None
    prompt: str | None
    response: str | None


@dataclass(frozen=True)
class Explanation:
    """Training rows that helped and that hurt an answer.

    Attributes:
        prompt: the request.
        response: the answer.
        generated: the model made the answer.
        generations: train generations combined, oldest first.
        values: (n,) float32, each training row's influence: the weighted sum over checkpoints of
            its cosine to the answer's gradient; NaN where a row cannot be used.
        helped: highest value first.
        hurt: lowest value first.
        skipped: number of unusable rows by reason.
    """

    prompt: str
    response: str
    generated: bool
    generations: tuple[str, ...]
    values: npt.NDArray[np.float32]
    helped: tuple[FoundRow, ...]
    hurt: tuple[FoundRow, ...]
    skipped: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as plain JSON values, without the values of all rows."""
        return {
            "prompt": self.prompt,
            "response": self.response,
            "generated": self.generated,
            "generations": list(self.generations),
            "skipped": dict(self.skipped),
            "helped": [asdict(row) for row in self.helped],
            "hurt": [asdict(row) for row in self.hurt],
        }


@dataclass(frozen=True)
class Token:
    """A token with its part of an influence.

    Attributes:
        text: as it reads.
        part: share of the cosine; 0 where it is no target.
        is_target: it has a label.
    """

    text: str
    part: float
    is_target: bool


@dataclass(frozen=True)
class Why:
    """Influence of one training row on one query, taken apart without a projection.

    All parts are of the exact influence, `exact`: the weighted sum over checkpoints of the cosine
    of whole features. The store's own score estimates it from projected, rounded ones.

    Attributes:
        row: the training row, with the store's score.
        exact: the exact influence.
        checkpoints: generation -> its weight and its `Contributions`, as they are.
        modules: module -> part, largest first; they add up to `exact`.
        row_tokens: tokens of the training row; with `momentum` their parts add up to `exact`.
        query_tokens: tokens of the query; their parts add up to `exact`.
        momentum: part of the training row's feature that no token brings about (feature `adam`).
    """

    row: FoundRow
    exact: float
    checkpoints: Mapping[str, tuple[float, Contributions]]
    modules: Mapping[str, float]
    row_tokens: tuple[Token, ...]
    query_tokens: tuple[Token, ...]
    momentum: float

    def to_dict(self) -> dict[str, Any]:
        """Return the parts as plain JSON values."""
        return {
            "row": asdict(self.row),
            "store_score": self.row.score,
            "exact": self.exact,
            "momentum": self.momentum,
            "checkpoints": {
                name: {"weight": weight, "cosine": each.cosine, "inner": each.inner,
                       "norms": list(each.norms), "parameters": dict(each.parameters)}
                for name, (weight, each) in self.checkpoints.items()
            },
            "modules": dict(self.modules),
            "row_tokens": [asdict(token) for token in self.row_tokens],
            "query_tokens": [asdict(token) for token in self.query_tokens],
        }  # fmt: skip


def found_rows(
    rows: Sequence[int] | npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    train: Generation,
    texts: RowTexts | None,
) -> tuple[FoundRow, ...]:
    """Describe training rows by their value, source and text, in the order given."""
    sources, held = train.sources, None if texts is None else texts.read(rows)
    found = []
    for rank, row in enumerate(map(int, rows), start=1):
        text = None if held is None else held[rank - 1]
        source = None if sources is None else (str(sources[row][0]), int(sources[row][1]))
        said = (None, None) if text is None else (text.prompt, text.response)
        found.append(FoundRow(rank, row, float(values[row]), source, *said))
    return tuple(found)


def combined(
    parts: Mapping[str, tuple[float, Contributions]],
) -> tuple[float, dict[str, float], npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """Add up checkpoints' normalised parts, each times its weight.

    Returns:
        Exact influence, modules, tokens of the row (t,), tokens of the query, momentum.
    """
    each = [
        contribution.scaled(weight / (contribution.norms[0] * contribution.norms[1]))
        for weight, contribution in parts.values()
    ]
    modules: dict[str, float] = {}
    for one in each:
        for name, part in one.modules.items():
            modules[name] = modules.get(name, 0.0) + part
    return (
        sum(one.inner for one in each),
        dict(sorted(modules.items(), key=lambda item: -item[1])),
        np.sum([one.row_tokens for one in each], axis=0),
        np.sum([one.query_tokens for one in each], axis=0),
        sum(one.row_rest for one in each),
    )


def tokens_of(
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    row: Mapping[str, Any],
    parts: npt.NDArray[np.float64],
) -> tuple[Token, ...]:
    """Pair each token of a row with its part; `parts` (t,) goes on with padding."""
    texts = token_texts(tokenizer, row["input_ids"])
    parts = parts[: len(texts)]
    return tuple(
        Token(text, float(part), place > 0 and label != IGNORED)
        for place, (text, part, label) in enumerate(zip(texts, parts, row["labels"], strict=True))
    )


def table_of(answers: Sequence[Explanation]) -> pa.Table:
    """Make a table of several answers: one line per query, side and row."""
    import pyarrow as pa

    lines = [
        {"query": number, "prompt": answer.prompt, "response": answer.response, "side": side,
         "rank": row.rank, "row": row.row, "score": row.score,
         "source_set": row.source and row.source[0], "source_row": row.source and row.source[1],
         "row_prompt": row.prompt, "row_response": row.response}
        for number, answer in enumerate(answers)
        for side, rows in (("helped", answer.helped), ("hurt", answer.hurt))
        for row in rows
    ]  # fmt: skip
    text, whole = pa.string(), pa.int64()
    schema = pa.schema(
        [("query", whole), ("prompt", text), ("response", text), ("side", text), ("rank", whole),
         ("row", whole), ("score", pa.float64()), ("source_set", text), ("source_row", whole),
         ("row_prompt", text), ("row_response", text)]
    )  # fmt: skip
    return pa.Table.from_pylist(lines, schema=schema)
