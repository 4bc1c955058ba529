"""Frames of a run for notebooks: its selections as pandas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dataflex.report.records import Records
from gradstore.errors import BadInput, expect_path

if TYPE_CHECKING:
    import pandas as pd


def selections_frame(output_dir: str | Path) -> pd.DataFrame:
    """Return the rows that a run selected, one line per update and row.

    The rows' text and source are those of the run's store:
    `frame.join(store.rows_frame("train/100"), on="row")`.

    Args:
        output_dir: the run's folder.

    Returns:
        Columns step (g, optimizer steps finished), rank (from 1, in the strategy's order), row
        (position in the processed data set), score (null where the strategy gives none).

    Raises:
        BadInput: the run has selected nothing, or there is no run.
    """
    import pandas as pd

    expect_path(output_dir, "output_dir")
    updates = Records.read(Path(output_dir) / "dataflex").answers
    if not updates:
        raise BadInput(
            f'no selection below "{output_dir}"; name the output_dir of a run that selects rows, '
            "or of one that has come to its first update."
        )
    frames = [
        pd.DataFrame(
            {"step": one.step, "rank": range(1, len(one.rows) + 1), "row": one.rows,
             "score": one.scores}
        )
        for one in updates
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True)
