"""The path that asks a model at hand about an answer that is in no target set."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Body, Request
from fastapi.responses import Response

from gradstore.scoring.pairing import parse_which
from gradstore.serve.access import NAMED, Here, Newest, Seconds
from gradstore.serve.answers import answer
from gradstore.serve.asking import RowScores, sides
from gradstore.serve.forms import ExplainForm
from gradstore.serve.jobs import Advance, Kept
from gradstore.serve.problems import RESPONSES, NoModel
from gradstore.serve.rows import Table
from gradstore.serve.served import Explained, commit_of, generation_of
from gradstore.store.reader import Store

router = APIRouter(prefix="/v1", responses=RESPONSES, dependencies=NAMED)


@dataclass(frozen=True)
class _Kept:
    """An explanation that the cache can weigh."""

    explained: Explained

    @property
    def nbytes(self) -> int:
        """Bytes of the scores."""
        return self.explained.values.nbytes


@router.post("/explain")
def explain(
    request: Request,
    served: Here,
    store: Newest,
    form: Annotated[ExplainForm, Body()],
    wait: Seconds = 10,
) -> Response:
    """Show who taught the model an answer; the model writes it if none is given."""
    explainer = served.explainer
    if explainer is None:
        raise NoModel(
            "this server has no model at hand, so it answers about rows of the target sets only "
            '(POST /v1/query). `dataflex-cli gradstore explain STORE --prompt "..."` loads the '
            "model that the store names."
        )

    which = parse_which(form.checkpoints)

    def compute(advance: Advance) -> _Kept:
        advance(0)
        return _Kept(
            explainer.explain(
                form.prompt, form.response, form.top,
                checkpoints=which, run=form.run, step=form.step,
                on_stage=lambda stage: advance(0, stage),
                on_rows=lambda rows: advance(rows, ""),
            )
        )  # fmt: skip

    asked = (form.prompt, form.response, which, form.run, form.step)
    key = ("explain", commit_of(store), *asked)
    found = served.desk.ask(key, "explain", _rows(store, form.run), compute, wait).explained
    table = _table(served.desk.kept, store, found, key)
    assert table.scores is not None
    helped, hurt = sides(table.scores, form.top)
    sides_shown = {"helped": table.lines(helped, form.characters),
                   "hurt": table.lines(hurt, form.characters)}  # fmt: skip
    content = {
        "commit": commit_of(store),
        "generation": table.generation.name,
        "generations": list(found.generations),
        "generated": found.generated,
        "target_row": _asked(found, form.characters),
        "usable_rows": int(table.scores.usable.sum()),
        "text": table.texts is not None,
        **sides_shown,
    }
    lines = [{"side": side, "rank": rank, **line}
             for side, found_rows in sides_shown.items()
             for rank, line in enumerate(found_rows, 1)]  # fmt: skip
    return answer(request, store, content, lines)


def _rows(store: Store, run: str) -> int:
    """Count the training rows that a run's questions scan; 0 where there is no such run."""
    trains = (g for g in store.generations() if g.role == "train" and g.set == "")
    return max((g.rows for g in trains if g.record.run == run), default=0)


def _table(kept: Kept, store: Store, found: Explained, key: Hashable) -> Table:
    """Return the training rows with the influence on the answer as scores."""
    generation = generation_of(store, found.generations[-1])
    best = np.where(np.isnan(found.values), -1, 0).astype(np.int32)
    return Table(store, generation, kept, RowScores(key, generation, (), found.values, best))


def _asked(found: Explained, characters: int) -> dict[str, str | int]:
    """Describe the question as `Table.lines` describes a row."""
    line: dict[str, str | int] = {}
    for name, text in (("prompt", found.prompt), ("response", found.response)):
        line[name], line[f"{name}_length"] = text[:characters], len(text)
    return line
