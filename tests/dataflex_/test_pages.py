"""What pages show to be typed is taken: commands with their options, and keys of configurations."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dataflex.bridge import arguments
from dataflex.cli import INTERRUPTED, app
from dataflex.config.keys import DataFlexConfig
from dataflex.config.presets import resolve
from gradstore import errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)
PROGRAM = re.compile(r"(?:dataflex-cli|-m dataflex) (.*)")

#: Words of a shell that end a command.
END = {"&", "&&", "|", ">", ";"}


def typed(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every dataflex-cli in a page's blocks for a shell."""
    for language, block in FENCE.findall(text):
        if language not in ("bash", "console", "text", ""):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if language in ("bash", "console") and (found := PROGRAM.search(line)):
                words = shlex.split(found[1], comments=True)
                ends = [place for place, word in enumerate(words) if word in END]
                yield words[: min(ends, default=len(words))]


def named(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every command that a page's prose names in backquotes."""
    prose = FENCE.sub("", text)
    for words in re.findall(r"`(?:dataflex-cli |(?=gradstore [a-z]))([^`]+)`", prose):
        yield words.split()


def found(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that some words call, and the words behind its name."""
    command, rest = typer.main.get_command(app), list(words)
    while rest and hasattr(command, "commands"):
        if rest[0].startswith("-") or rest[0] == "COMMAND":
            break
        assert rest[0] in command.commands, f"{rest[0]!r} of {words} is no command"
        command = command.commands[rest.pop(0)]
    return command, rest


def options(command: Any) -> set[str]:
    """Return the options of a command, and those that every command has."""
    own = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return own | {"--help", "-h", "--debug"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_of_a_page_is_one_and_has_its_options(page: Path) -> None:
    text = page.read_text()
    for words in typed(text):
        command, rest = found(words)
        # As the program reads them: a wrong word or a missing one is click's UsageError.
        command.make_context(" ".join(words), rest)
    for words in named(text):
        command, rest = found(words)
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert given <= options(command), words


def test_pages_show_commands() -> None:
    """The patterns above find what they look for."""
    shown = [words for page in PAGES for words in typed(page.read_text())]
    assert len(shown) > 60
    assert ["gradstore", "build", "CONFIG.yaml", "--worker", "$i/4"] in shown
    assert any(words[:2] == ["gradstore", "explain"] for words in shown)
    assert ["train", "--help"] in [w for page in PAGES for w in named(page.read_text())]


@pytest.mark.parametrize("page", ["README.md", "docs/reference/commands.md"])
def test_the_exit_codes_of_a_page_are_all_there_are(page: str) -> None:
    text = (ROOT / page).read_text()
    said = re.search(r"(?:## Exit codes\n|Exit codes:)(.*?)\n\n(?!0)", text, flags=re.S)
    assert said is not None
    told = {int(code) for code in re.findall(r"(?<!\S)(\d+)\s[a-z]", said[1])}
    own = {each.exit_code for each in vars(errors).values()
           if isinstance(each, type) and issubclass(each, errors.StoreError)}  # fmt: skip
    assert told == {0, INTERRUPTED} | own


def test_no_message_sends_to_a_page_that_the_wheel_does_not_have() -> None:
    """Comments and docstrings may name pages: who reads them has the repository."""
    for package in ("dataflex", "gradstore", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            kept = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and id(node) not in kept:
                    assert not re.search(r"docs/[\w-]+\.md", str(node.value)), (path, node.lineno)


BLOCKS = [
    (page, block)
    for page in PAGES
    for language, block in FENCE.findall(page.read_text())
    if language == "yaml"
]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page.name for page, _ in BLOCKS])
def test_every_configuration_of_a_page_has_keys_and_parameters_that_exist(
    page: Path, block: str
) -> None:
    """A part of one is read as a part of a run with LESS."""
    content = {"train_type": "dynamic_select", "component_name": "less", **yaml.safe_load(block)}
    assert set(content) <= set(DataFlexConfig.__dataclass_fields__) | arguments.accepted_keys()
    chosen = content["train_type"], content["component_name"], content.get("component_params", {})
    resolve(*chosen).build()
