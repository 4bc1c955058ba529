"""Shapes of questions: what a request may hold, checked before anything is read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gradstore.scoring.rules import Subset

#: Largest row, step or count that is taken as a number at all.
LARGEST = 2**53

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Position = Annotated[int, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(gt=0, lt=1)]
Score = Annotated[float, Field(allow_inf_nan=False)]
Wait = Annotated[
    float, Field(ge=0, le=60, allow_inf_nan=False, description="Seconds to wait; then 202.")
]
Characters = Annotated[
    int, Field(ge=0, le=LARGEST, description="Cut prompt and response to so many characters each.")
]

#: Sort keys; a minus sign in front means descending.
Sort = Literal["row", "-row", "score", "-score", "length", "-length", "source", "-source"]


class Form(BaseModel):
    """A request in which a mistyped name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Question(Form):
    """The training rows' scores that are asked for: the options of `gradstore score`."""

    checkpoints: str = Field(default="last", description="last, all or a number of them.")
    step: Position | None = Field(default=None, description="None is taken of a later step.")
    run: str = Field(default="", description="Prefix of the generations (gradstore_run).")
    target: list[str] = Field(default=[], description="Target sets; none given: all.")
    target_row: Position | None = Field(
        default=None,
        description="Score by this one row of the first target set.",
    )
    subtasks: list[Count] = Field(default=[], description="Sizes that cut the one target set.")
    aggregation: Literal["max", "mean"] = Field(default="max", description="Over sub-tasks.")


class ScoreForm(Question):
    """`POST /v1/score`."""

    values: bool = Field(default=True, description="Send the score of every row.")
    bins: int = Field(default=40, ge=1, le=1000, description="Bins of the histogram.")


class Budget(Question):
    """A selection: a question, a rule, and one of three budgets; `drop_harmful` may do without."""

    k: Count | None = Field(default=None, description="Rows to take.")
    count: Count | None = Field(default=None, description="Another name of k.")
    fraction: Score | None = Field(default=None, description="Share of the usable rows.")
    token_budget: Count | None = Field(default=None, description="Target tokens of all rows.")
    tokens: Count | None = Field(default=None, description="Another name of token_budget.")
    subset: Subset = Field(default="top", description="Rule that turns scores into rows.")
    neighbours: Count | None = Field(default=None, description="K of knn_uniform; none: found.")
    subset_params: dict[str, Score] = Field(
        default={}, description="Constants of the rule, others than its own defaults."
    )
    quotas: dict[str, Count | Share] = Field(
        default={}, description="Most rows of a data set, or a share of the rows taken."
    )
    length_correction: Literal["none", "regression", "bins"] = Field(
        default="none", description="Takes the rows' length out of the scores of top."
    )


class SelectForm(Budget):
    """`POST /v1/select`."""

    characters: Characters = 0


class QueryForm(Form):
    """`POST /v1/query`: one row of one target set."""

    target_row: Position
    target: str = Field(default="", description="Target set; default: the first.")
    top: int = Field(default=10, ge=1, le=1000, description="Rows on each side.")
    checkpoints: str = "last"
    step: Position | None = None
    run: str = ""
    characters: Characters = 2000

    def question(self) -> Question:
        """Return the scores that this asks for."""
        return Question(
            checkpoints=self.checkpoints,
            step=self.step,
            run=self.run,
            target=[self.target] if self.target else [],
            target_row=self.target_row,
        )


class PairQuery(Form):
    """`GET /v1/pair.jsonl`: some rows of one target set."""

    row: list[Position] = Field(min_length=1, max_length=100, description="Target rows.")
    target: str = Field(default="", description="Target set; default: the first.")
    top: int = Field(default=20, ge=1, le=1000, description="Rows on each side.")
    checkpoints: str = "last"
    step: Position | None = None
    run: str = ""
    characters: Characters = 20_000
    wait: Wait = 30


class DiffForm(Form):
    """`POST /v1/diff`: two selections."""

    before: Budget
    after: Budget
    top: int = Field(default=50, ge=0, le=1000, description="Rows to show on each side.")
    characters: Characters = 400


class ExplainForm(Form):
    """`POST /v1/explain`: an answer that is in no target set."""

    prompt: Annotated[str, Field(max_length=1_000_000)]
    response: Annotated[str, Field(max_length=1_000_000)] | None = Field(
        None, description="None: the model generates one."
    )
    top: int = Field(default=10, ge=1, le=1000)
    checkpoints: str = "last"
    step: Position | None = None
    run: str = ""
    characters: Characters = 2000


class RowFilter(Question):
    """Rows of a table: which, in which order."""

    scored: bool = Field(default=False, description="With scores; needs a target set in the store.")
    sort: Sort = "row"
    min_score: Score | None = None
    max_score: Score | None = None
    source: list[str] = Field(default=[], description="Data sets; none given: all.")
    status: list[str] = Field(default=[], description="ok, masked, ...; none given: all.")
    contains: str = Field(default="", max_length=1000, description="Text in prompt or response.")
    row: list[Position] = Field(default=[], max_length=1000, description="None given: all.")

    @property
    def asks_scores(self) -> bool:
        """The table needs scores."""
        bounds = self.min_score is not None or self.max_score is not None
        return self.scored or bounds or self.sort.endswith("score")


class RowsQuery(RowFilter):
    """`GET /v1/rows`."""

    generation: str = Field(default="", description="Default: the newest of the training rows.")
    offset: Position = 0
    limit: int = Field(default=100, ge=0, le=1000)
    characters: Characters = 400
    wait: Wait = 30


class MapQuery(Question):
    """`GET /v1/map`."""

    scored: bool = False
    points: int = Field(default=20_000, ge=2, le=1_000_000, description="At most, evenly spaced.")
    wait: Wait = 30
