"""Helpers and hurters of target rows in the JSON lines of PAIR's viewer (pretraining-tda).

One line per target row; the viewer's page loads the file as it is. Its documented fields are
example_id, query_set, inputs_plaintext, targets_plaintext, proponents, proponent_ids,
proponent_scores, opponents, opponent_ids and opponent_scores; `trex_id` is the name it shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def viewer_line(
    target: str,
    asked: dict[str, Any],
    helped: Sequence[dict[str, Any]],
    hurt: Sequence[dict[str, Any]],
) -> str:
    """Write one target row.

    Args:
        target: name of its set.
        asked: the target row, as `Table.lines` describes it.
        helped: train rows with scores, best first.
        hurt: train rows with scores, worst first.
    """
    line = {
        "example_id": f"{target}/{asked['row']}",
        "trex_id": f"{target}[{asked['row']}]",
        "query_set": target,
        "inputs_plaintext": asked["prompt"] or "",
        "targets_plaintext": asked["response"] or "",
        **_side("proponent", helped),
        **_side("opponent", hurt),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _side(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {
        f"{name}s": [_passage(row) for row in rows],
        f"{name}_ids": [_place(row) for row in rows],
        f"{name}_scores": [row["score"] for row in rows],
    }


def _place(row: dict[str, Any]) -> str:
    return "{}[{}]".format(*row["source"]) if row["source"] else f"row {row['row']}"


def _passage(row: dict[str, Any]) -> str:
    """Return a train row's text; where the store has none, its source."""
    texts = [row[name] for name in ("prompt", "response") if row[name]]
    return "\n".join(texts) or _place(row)
