"""`dataflex-cli gradstore explain`: questions from the command line, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dataflex.bridge.arguments import accepted_keys
from dataflex.config.documents import check_form, overridden
from dataflex.config.registry import unknown
from gradstore.errors import BadInput, expect_whole
from gradstore.format.foreign import read_object
from gradstore.storage.tables import check_suffix, write_table

_WANTED = '{"prompt": TEXT, "response": TEXT}, the response optional'


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One call of the command.

    Attributes:
        questions: each a prompt and a response; None lets the model answer.
        top: rows to name on each side.
        why: a training row to take apart with the one question.
        output: file for the rows of all answers.
        as_json: print JSON.
    """

    questions: Sequence[tuple[str, str | None]]
    top: int = 10
    why: int | None = None
    output: Path | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        """Refuse, before anything is loaded, what could only fail later.

        Raises:
            BadInput: a row to take apart with several questions, top < 1, an unknown file format.
        """
        expect_whole(self.top, "top")
        if self.output is not None:
            check_suffix(self.output)
        if self.why is not None and len(self.questions) != 1:
            raise BadInput(
                f"--why takes one question apart, {len(self.questions)} were given; give one."
            )


def questions_of(
    prompt: str | None, response: str | None, file: Path | None
) -> list[tuple[str, str | None]]:
    """Gather the questions: the one of the command line, or those of a JSONL file.

    Raises:
        BadInput: neither or both, or a line that is no object with a prompt.
        StoreIOError: the file cannot be read.
    """
    if (prompt is None) == (file is None):
        raise BadInput("give either --prompt TEXT or --file rows.jsonl.")
    if file is None:
        return [(prompt or "", response)]
    if response is not None:
        raise BadInput("--response goes with --prompt; in a file each line has its own.")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise BadInput(
            f"--file {str(file)!r} cannot be read: {said}; name a file of JSON lines {_WANTED}."
        ) from error
    found = [_question(f"{file}, line {n}", line) for n, line in enumerate(lines, 1) if line]
    if not found:
        raise BadInput(
            f'file {str(file)!r} has no line; each is {{"prompt": ..., "response": ...}}'
        )
    return found


def _question(where: str, line: str) -> tuple[str, str | None]:
    try:
        given = read_object(line)
    except ValueError as error:
        raise BadInput(f"{where}: {error}; give {_WANTED}.") from error
    prompt, response = given.get("prompt"), given.get("response")
    if not isinstance(prompt, str) or not isinstance(response, str | None):
        raise BadInput(f"{where} is not {_WANTED}.")
    return prompt, response


def explain(store: Path, asked: Asked, options: dict[str, Any], changes: Sequence[str]) -> None:
    """Load the model that made a store, ask it, and print or write the answers.

    Args:
        store: the store's folder.
        asked: what to ask.
        options: of `open_model`; `checkpoints` as text.
        changes: `key=value` for `open_model`.

    Raises:
        BadInput: as `open_model` and `Explainer`, and for a key that there is not.
    """
    check_form(changes)
    given = OmegaConf.to_container(overridden(OmegaConf.create({}), changes))
    keys = {str(key): value for key, value in dict(given).items()}  # type: ignore[arg-type]
    if extra := set(keys) - accepted_keys():
        raise BadInput(unknown("key", extra, accepted_keys()))
    from gradstore.scoring.pairing import parse_which  # imports torch

    which = parse_which(options.pop("checkpoints"))
    from dataflex.launch.explain import open_model

    explainer = open_model(store, checkpoints=which, changes=keys, **options)
    answers = [explainer.explain(*question, top=asked.top) for question in asked.questions]
    why = None
    if asked.why is not None:
        why = explainer.why(asked.why, answers[0].prompt, answers[0].response)
    if asked.output is not None:
        from dataflex.launch.explained import table_of

        write_table(asked.output, table_of(answers))
    from dataflex.launch import shown

    if asked.as_json:
        listed = [answer.to_dict() for answer in answers]
        if why is not None:
            listed[0]["why"] = why.to_dict()
        shown.print_json(listed[0] if len(listed) == 1 else listed)
        return
    if why is not None:
        shown.show_why(why, answers[0])
        return
    for answer in answers:
        shown.show(answer)
