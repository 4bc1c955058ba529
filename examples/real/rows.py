"""Chooses the rows of the real example: pure functions, the same answer on every machine.

Three kinds, all from the data that LlamaFactory's source distribution carries: `alpaca`
(instructions), `glaive` (conversations that call a tool) and `identity` (who the assistant is).
A row's kind can be read back from the data set's name, its origin from `sources.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradstore.errors import DamagedData

Row = dict[str, Any]

SEED = 42
POOL_ROWS = {"alpaca": 100, "glaive": 50, "identity": 50}
TARGET_KIND = "glaive"
TARGET_ROWS = 32
# Characters, not tokens: the choice then needs no tokenizer. About 4 of prose, 2.6 of JSON a token.
MAX_CHARS = {"alpaca": 900, "glaive": 1200, "identity": 900}
IDENTITY = {"{{name}}": "Flex", "{{author}}": "the DataFlex project"}


def alpaca_row(row: Row) -> Row | None:
    """Return the row unchanged; None where a part that training needs is empty."""
    return dict(row) if row["instruction"].strip() and row["output"].strip() else None


def identity_row(row: Row) -> Row | None:
    """Fill in the row's placeholders for name and author."""
    filled = {}
    for key, text in row.items():
        for placeholder, value in IDENTITY.items():
            text = text.replace(placeholder, value)
        filled[key] = text
    return alpaca_row(filled)


def glaive_row(row: Row) -> Row | None:
    """Cut the conversation after the answer that follows its first tool call.

    Later turns only add length. None where no tool is called, or where the speakers do not
    alternate (LlamaFactory drops such rows, which would shift the indices of all that follow).
    """
    turns = row["conversations"]
    speakers = [turn["from"] for turn in turns]
    if "observation" not in speakers:
        return None
    end = speakers.index("observation") + 2
    asked, answered = speakers[0:end:2], speakers[1:end:2]
    if len(asked) != len(answered) or answered[-2:] != ["function_call", "gpt"]:
        return None
    if not set(asked) <= {"human", "observation"} or not set(answered) <= {"gpt", "function_call"}:
        return None
    return {"conversations": turns[:end], "tools": row["tools"]}


PREPARE: Mapping[str, Callable[[Row], Row | None]] = {
    "alpaca": alpaca_row,
    "glaive": glaive_row,
    "identity": identity_row,
}


def characters(row: Row) -> int:
    """Length of all text in the row that reaches the model, in characters."""
    if "conversations" in row:
        return len(row["tools"]) + sum(len(turn["value"]) for turn in row["conversations"])
    return sum(len(text) for text in row.values())


def draw_key(kind: str, index: int) -> bytes:
    """Sort key that shuffles source rows the same way everywhere (no library's random state)."""
    return hashlib.blake2b(f"{SEED}:{kind}:{index}".encode(), digest_size=16).digest()


def usable_rows(kind: str, source: Sequence[Row]) -> list[tuple[int, Row]]:
    """Collect prepared rows of one kind that are not too long or repeated, in drawing order.

    Args:
        kind: `alpaca`, `glaive` or `identity`.
        source: The rows of that kind's file, in file order.

    Returns:
        (index in `source`, prepared row) pairs.
    """
    chosen: list[tuple[int, Row]] = []
    seen: set[str] = set()
    for index in sorted(range(len(source)), key=lambda i: draw_key(kind, i)):
        row = PREPARE[kind](source[index])
        if row is None or characters(row) > MAX_CHARS[kind] or repr(row) in seen:
            continue
        seen.add(repr(row))
        chosen.append((index, row))
    return chosen


def choose_rows(sources: Mapping[str, Sequence[Row]]) -> dict[str, list[tuple[int, Row]]]:
    """Draws the pool, the target and the held-out target, no source row twice.

    Args:
        sources: Kind -> the rows of that kind's file.

    Returns:
        File stem (`real_alpaca`, ..., `target`, `target_heldout`) -> (source index, row) pairs.

    Raises:
        DamagedData: A kind has too few usable rows.
    """
    chosen: dict[str, list[tuple[int, Row]]] = {}
    for kind, count in POOL_ROWS.items():
        rows = usable_rows(kind, sources[kind])
        needed = count + (2 * TARGET_ROWS if kind == TARGET_KIND else 0)
        if len(rows) < needed:
            raise DamagedData(f"{kind}: {len(rows)} usable rows of {needed} needed")
        chosen[f"real_{kind}"] = rows[:count]
        if kind == TARGET_KIND:
            chosen["target"] = rows[count : count + TARGET_ROWS]
            chosen["target_heldout"] = rows[count + TARGET_ROWS : needed]
    return chosen


def dataset_info() -> dict[str, Row]:
    """LlamaFactory's description of the files that `choose_rows` fills."""
    sharegpt = {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    }
    kinds = {f"real_{kind}": (f"real_{kind}", kind) for kind in POOL_ROWS}
    kinds["real_target"] = ("target", TARGET_KIND)
    kinds["real_target_heldout"] = ("target_heldout", TARGET_KIND)
    return {
        name: {"file_name": f"{stem}.json"} | (sharegpt if kind == "glaive" else {})
        for name, (stem, kind) in kinds.items()
    }
