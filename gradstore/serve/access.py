"""Access of the paths to what is served: the store at its newest commit, and its tables."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Query, Request

from gradstore.errors import BadInput
from gradstore.serve import asking
from gradstore.serve.forms import Question, Wait
from gradstore.serve.jobs import WAITER
from gradstore.serve.rows import Table
from gradstore.serve.served import Served, generation_of
from gradstore.store.generation import Generation
from gradstore.store.reader import Store


def served_of(request: Request) -> Served:
    """Return what the app serves."""
    served: Served = request.app.state.served
    return served


def store_of(served: Annotated[Served, Depends(served_of)]) -> Store:
    """Return the store at its newest commit."""
    return served.view()


async def name_waiter(
    gradstore_waiter: Annotated[
        str,
        Header(
            max_length=64,
            description="Name of who asks. Equal questions share one job, and DELETE on a job lets "
            "go of this name alone: the job is cancelled once nobody is left. Give each question a "
            "name that nobody else has; callers without one count as one.",
        ),
    ] = "",
) -> None:
    """Take the name of who asks from the request; async, so that the request's context has it."""
    WAITER.set(gradstore_waiter)


#: What the paths that make or end jobs depend on.
NAMED = [Depends(name_waiter)]

Here = Annotated[Served, Depends(served_of)]
Newest = Annotated[Store, Depends(store_of)]
Seconds = Annotated[Wait, Query()]


def table_of(
    served: Served, store: Store, question: Question, wait: float, *, name: str = "",
    scored: bool = True,
) -> Table:  # fmt: skip
    """Open the table of a generation, of the newest training rows if no name is given.

    Args:
        served: for kept results.
        store: at its newest commit.
        question: what the rows are scored by.
        wait: seconds for the scores.
        name: of the generation.
        scored: with scores.
    """
    if not scored:
        generation = generation_of(store, name) if name else newest_train(store, question)
        return Table(store, generation, served.desk.kept)
    scores = asking.scores_of(store, question, served.desk, wait)
    if name and generation_of(store, name).commit_sha != scores.train.commit_sha:
        raise BadInput(f"the scores are those of {scores.train.name}, the generation asked for is "
                       f"{name}; leave one of them out.")  # fmt: skip
    return Table(store, scores.train, served.desk.kept, scores)


def newest_train(store: Store, question: Question) -> Generation:
    """Return the newest generation of the training rows; it needs no target set."""
    found = [
        each for each in store.generations()
        if each.role == "train" and each.set == "" and each.record.run == question.run
        and (question.step is None or each.step <= question.step)
    ]  # fmt: skip
    if not found:
        raise BadInput(f'store "{store.path}" has no committed train generation of run '
                       f"{question.run!r}; build one first.")  # fmt: skip
    return max(found, key=lambda each: each.step)
