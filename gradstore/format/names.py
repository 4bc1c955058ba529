"""Names of generations and spaces, which are also their paths in a store.

A name from a user is quoted, a name from a disk is parsed strictly: what `str()` would not give is
refused, so no name can lead out of the store.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote as percent_encoded
from urllib.parse import unquote

from gradstore.errors import BadInput, expect

Role = Literal["train", "target"]

#: Unicode's control, format and surrogate characters, line and paragraph separators.
_UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@-]*")
_QUOTED = re.compile(r"[A-Za-z0-9%][A-Za-z0-9._%+=@-]{0,159}")
_STEP = re.compile(r"(0|[1-9][0-9]{0,17})(?:\.([1-9][0-9]{0,8}))?")


def quote(name: str) -> str:
    """Quote a run's or data set's name in a form that is safe as a folder name, and reversible.

    >>> quote("alpaca_en"), quote("org/set one"), quote("..")
    ('alpaca_en', 'org%2Fset%20one', '%2E.')
    """
    safe = percent_encoded(name, safe="+=@").replace("~", "%7E")
    if safe and safe[0] in "._+=@-":
        safe = f"%{ord(safe[0]):02X}{safe[1:]}"
    if not _QUOTED.fullmatch(safe):
        raise BadInput(
            f"{name!r} can't name a part of a store: it needs 1 to about 150 characters; "
            "choose another name"
        )
    return safe


def printable(text: str) -> str:
    r"""Return text that a terminal only shows: control characters are spelled out.

    Names of data sets, rows and stores come from files; an escape sequence in one would act on the
    terminal, and a direction mark would show another name than the one that is there.

    >>> printable("a\tb\n"), printable("set\x1b[2J"), printable("\u202eevil")
    ('a\tb\n', 'set\\x1b[2J', '\\u202eevil')
    """
    return "".join(
        char if char in "\t\n" or unicodedata.category(char) not in _UNSHOWN
        else char.encode("unicode_escape").decode()
        for char in text
    )  # fmt: skip


@dataclass(frozen=True)
class GenerationName:
    """`[run/]train/<step>` or `[run/]target/<set>/<step>`, with `.<attempt>` from the second on.

    >>> str(GenerationName.parse("a/target/gsm8k/100.2").base())
    'a/target/gsm8k/100'
    """

    role: Role
    step: int
    set: str = ""
    run: str = ""
    attempt: int = 1

    def __post_init__(self) -> None:
        if self.role not in ("train", "target"):
            raise BadInput(f"role is {self.role!r}; it must be train or target")
        if (self.role == "target") != bool(self.set):
            raise BadInput(
                f"role {self.role} with set {self.set!r}: targets name a set, train none; "
                "give or leave out the set"
            )
        if self.run in ("train", "target"):
            raise BadInput(f"a run can't be named {self.run!r}; choose another gradstore_run")
        if not 0 <= self.step < 10**18 or not 1 <= self.attempt < 10**9:
            raise BadInput(
                f"step {self.step}, attempt {self.attempt}: out of range; "
                "a step is 0 or more, an attempt 1 or more"
            )

    def __str__(self) -> str:
        parts = [quote(self.run)] if self.run else []
        parts += [self.role, *([quote(self.set)] if self.set else [])]
        last = f"{self.step}" if self.attempt == 1 else f"{self.step}.{self.attempt}"
        return "/".join([*parts, last])

    @classmethod
    def parse(cls, text: str) -> GenerationName:
        """Parse a name; raise BadInput when it is not exactly in the form of `str()`."""
        expect(isinstance(text, str), "a generation's name", text, "text such as 'train/16'")
        parts = text.split("/")
        step = _STEP.fullmatch(parts[-1])
        try:
            place = 0 if parts[0] in ("train", "target") else 1
            run, middle = [unquote(p) for p in parts[:place]], [unquote(p) for p in parts[place:-1]]
            if step is None or len(middle) > 2 or middle[0] not in ("train", "target"):
                raise ValueError(text)
            name = cls(
                role="train" if middle[0] == "train" else "target",
                step=int(step[1]),
                set="".join(middle[1:]),
                run="".join(run),
                attempt=int(step[2] or 1),
            )
            if str(name) != text:
                raise ValueError(text)
        except (ValueError, IndexError, BadInput) as error:
            raise BadInput(
                f"{text!r} is no generation; names are [run/]train/STEP or [run/]target/SET/STEP"
            ) from error
        return name

    def base(self) -> GenerationName:
        """Return the same name without its attempt."""
        return GenerationName(self.role, self.step, self.set, self.run)

    def with_attempt(self, attempt: int) -> GenerationName:
        """Return the same name with another attempt."""
        return GenerationName(self.role, self.step, self.set, self.run, attempt)


def check_space(space: str) -> str:
    """Return `space` if it can name a folder; raise BadInput otherwise."""
    expect(isinstance(space, str), "space", space, "a name")
    if not _PLAIN.fullmatch(space) or len(space) > 100:
        raise BadInput(
            f"{space!r} can't name a space: use letters, digits and ._+=@- only, 100 at most"
        )
    return space


def space_run(space: str, run: str = "") -> str:
    """Return the run prefix of a space's generations, so that no two spaces share a path.

    >>> space_run("gradient", "a"), space_run("minilm"), space_run("minilm", "a")
    ('a', 'minilm', 'a+minilm')
    """
    if check_space(space) == "gradient":
        return run
    return f"{run}+{space}" if run else space
