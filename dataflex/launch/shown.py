"""Answers of an `Explainer` on a terminal: tables, and text coloured by the parts of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from dataflex.launch.explained import Explanation, FoundRow, Token, Why
from gradstore.cli.options import NO_TEXT, print_json, print_table, shown
from gradstore.format.names import printable

__all__ = ["print_json", "show", "show_why"]

#: Tokens named in a table, on each row.
_STRONGEST = 8


def show(answer: Explanation) -> None:
    """Print who helped and who hurt."""
    _show_question(answer)
    for side, rows in (("helped", answer.helped), ("hurt", answer.hurt)):
        print_table(
            ("rank", "row", "score", f"source ({side})", "text"),
            [(row.rank, row.row, f"{row.score:+.4f}", _source(row), _text(row)) for row in rows],
        )  # fmt: skip
    if any(row.prompt is None for row in (*answer.helped, *answer.hurt)):
        print(NO_TEXT)
    if answer.skipped:
        print("skipped: " + ", ".join(f"{count} {why}" for why, count in answer.skipped.items()))


def show_why(why: Why, answer: Explanation) -> None:
    """Print one pair, a training row and the question, taken apart."""
    row = why.row
    _show_question(answer)
    print(
        f"row {row.row} {_source(row)}: exact influence {why.exact:+.6f}, the store's score "
        f"{row.score:+.4f}\nThe score estimates it: features are projected and rounded in the "
        "store. All parts below are of the exact one, and add up to it."
    )
    if len(why.checkpoints) > 1:
        print_table(
            ("checkpoint", "weight", "cosine"),
            [(name, f"{weight:.3f}", f"{each.cosine:+.6f}")
             for name, (weight, each) in why.checkpoints.items()],
        )  # fmt: skip
    print_table(
        ("module", "part", "of the influence"),
        [(name, f"{part:+.6f}", _share(part, why.exact)) for name, part in why.modules.items()],
    )
    console = Console(soft_wrap=True)
    for name, tokens in (("training row", why.row_tokens), ("answer", why.query_tokens)):
        print(f"\n{name}, by the parts of its tokens (green helps, red hurts):")
        console.print(coloured(tokens))
        placed = [(place, each) for place, each in enumerate(tokens) if each.is_target]
        strongest = sorted(placed, key=lambda pair: -abs(pair[1].part))[:_STRONGEST]
        print_table(
            ("place", f"token of the {name}", "part", "of the influence"),
            [(place, repr(token.text), f"{token.part:+.6f}", _share(token.part, why.exact))
             for place, token in strongest],
        )  # fmt: skip
    if why.momentum:
        print(f"momentum, which no token of the training row brings about: {why.momentum:+.6f}")
    if row.prompt is None:
        print(NO_TEXT)


def _show_question(answer: Explanation) -> None:
    made = " (the model's own)" if answer.generated else ""
    print(printable(f"prompt: {answer.prompt}\nresponse{made}: {answer.response}"))
    print(f"asked: {', '.join(answer.generations)}")


def coloured(tokens: Sequence[Token]) -> Text:
    """Colour tokens: green helps, red hurts, the deeper the larger; grey has no part."""
    largest = max((abs(token.part) for token in tokens), default=0.0) or 1.0
    text = Text()
    for token in tokens:
        style = "dim"
        if token.is_target:
            depth = abs(token.part) / largest
            fade = round(255 - 155 * depth)
            red, green = (fade, 255) if token.part >= 0 else (255, fade)
            style = f"black on rgb({red},{green},{fade})"
        text.append(printable(token.text), style=style)
    return text


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:+.1f}%" if whole else ""


def _source(row: FoundRow) -> str:
    return "" if row.source is None else f"{row.source[0]}[{row.source[1]}]"


def _text(row: FoundRow) -> str:
    if row.prompt is None or row.response is None:
        return ""
    return shown({"prompt": row.prompt, "response": row.response})
