"""Token ids of the rows against the embeddings of the model in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dataflex.data.rows import Rows, RunData
from gradstore.capture.limits import vocabulary_size
from gradstore.errors import BadInput
from gradstore.export.visual import visual_token_ids

#: Tokens that a message names, at most.
NAMED = 5


def check_vocabulary(model: Any, data: RunData) -> None:  # noqa: ANN401 - a PreTrainedModel
    """Refuse rows with a token that the model has no embedding for, before a step is trained.

    On an accelerator such a token ends in a device assertion that names nothing. Tokens that stand
    for pictures are looked up elsewhere.

    Raises:
        BadInput: names the set, the first such row, its tokens, and `resize_vocab`.
    """
    size = vocabulary_size(model)
    if size is None:
        return
    elsewhere = set(visual_token_ids(getattr(model, "config", None)))
    for rows in _all_rows(data):
        found: set[int] = set()
        first = None
        for i in (rows.largest_ids >= size).nonzero()[0]:
            beyond = {t for t in rows.dataset[int(i)]["input_ids"] if t >= size} - elsewhere
            first = int(i) if beyond and first is None else first
            found |= beyond
        if first is None:
            continue
        tokens = sorted(found)
        names = [f"{t} ({data.tokenizer.convert_ids_to_tokens(t)!r})" for t in tokens[:NAMED]]
        more = f" and {len(tokens) - NAMED} more" if len(tokens) > NAMED else ""
        origin = rows.sources[first] if rows.sources is not None else None
        where = f"data set {origin[0]!r}, row {origin[1]}" if origin else f"row {first}"
        raise BadInput(
            f"the model has embeddings for {size} tokens, but {rows.name!r} has rows with the "
            f"tokens {', '.join(names)}{more}, first {where}. Template {data.template!r}, or "
            "add_tokens or add_special_tokens, brings tokens that the model was not made with: "
            "set resize_vocab: true, or use the model's own template."
        )


def _all_rows(data: RunData) -> Iterator[Rows]:
    yield data.train
    yield from data.targets
    if data.domains is not None:
        yield from data.domains.held_out.values()
