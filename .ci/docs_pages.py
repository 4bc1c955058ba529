"""Hooks of mkdocs: pages made of the code, each page's Markdown beside it, and llms.txt.

The reference of commands, keys and strategies is read from what runs, at each build, so it cannot
say something else; its pages in docs/ say where it goes. Pages of the repository's root appear with
links that fit the site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import Field
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation, Section
from mkdocs.structure.pages import Page
from typer.core import TyperArgument, TyperCommand, TyperGroup

ROOT = Path(__file__).resolve().parent.parent

#: Links of pages in the repository's root, as they are called on the site.
MOVED = {
    "README.md#the-house": "house.md",
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/adr": "adr/index.md",
}

#: Markdown of every page, by its path; filled while the site is built.
_sources: dict[str, str] = {}
_nav: list[Navigation] = []


# ---- pages made of the code --------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file of docs/ holds."""
    _sources.clear()
    _nav.clear()
    made = {
        "adr/index.md": decisions(),
        "house.md": house(),
        "contributing.md": moved(ROOT / "CONTRIBUTING.md"),
        "changelog.md": moved(ROOT / "CHANGELOG.md"),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def commands() -> str:
    """Write the reference of `dataflex-cli` from its Typer application."""
    import typer

    from dataflex.cli import app

    root = typer.main.get_command(app)
    return "\n".join(_command(root, ["dataflex-cli"]))


def _command(command: TyperCommand | TyperGroup, words: list[str]) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = [_metavar(each) for each in arguments]
        yield f"## {' '.join(words)}\n"
        yield f"{_text(command.help)}\n"
        options = ["[OPTIONS]"] if len(arguments) < len(command.params) else []
        yield "```text\n" + " ".join([*words, *options, *usage]) + "\n```\n"
        yield from _parameters(command.params)
        return
    for name, each in sorted(inner.items(), key=lambda item: bool(getattr(item[1], "commands", 0))):
        if not each.hidden:
            yield from _command(each, [*words, name])


def _metavar(argument: TyperArgument) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _parameters(parameters: list[Any]) -> Iterator[str]:
    rows = []
    for each in parameters:
        if each.param_type_name == "argument":
            names = f"`{_metavar(each)}`"
        else:
            names = ", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts))
        default = each.default
        silent = default is None or default is False or callable(default) or each.required
        said = "required" if each.required else "" if silent or default == "" else f"`{default}`"
        rows.append((names, _text(getattr(each, "help", "")), said))
    if rows:
        yield table(("", "", "default"), rows) + "\n"


def keys() -> str:
    """Write the reference of a configuration's keys: DataFlex's, then LlamaFactory's by class."""
    import dataclasses

    from dataflex.bridge.arguments import described_keys
    from dataflex.config.keys import DataFlexConfig
    from dataflex.config.sources import find_class

    source = find_class(DataFlexConfig.__module__, DataFlexConfig.__name__)
    assert source is not None
    said = source.fields()
    ours = [
        (f"`{field.name}`", _text(said[field.name].help), _default(field))
        for field in dataclasses.fields(DataFlexConfig)
        if field.name in said
    ]
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in described_keys().values():
        groups.setdefault(key.owner, []).append((f"`{key.name}`", _text(key.help)))
    parts = [
        "## DataFlex\n",
        table(("key", "", "default"), ours),
    ]
    for owner, rows in groups.items():
        parts += [f"\n## {owner}\n", table(("key", ""), rows)]
    return "\n".join(parts) + "\n"


def _default(field: Field[Any]) -> str:
    value = field.default
    empty = value is None or value == () or value == "" or "MISSING" in repr(value)
    return "" if empty else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def strategies() -> str:
    """Write the reference of strategies and their parameters: the catalogue of `components`."""
    from dataflex.config.registry import KINDS
    from dataflex.launch.components import as_yaml, catalogue, other_presets

    parts: list[str] = []
    types = {kind: train_type for train_type, (_, kind) in KINDS.items()}
    entries = catalogue()
    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        parts.append(f"## {kind}\n\n`train_type: {types[kind]}`\n")
        for entry in (e for e in entries if e["kind"] == kind):
            parts.append(f"### {kind}: {entry['name']}\n\n{_text(entry['summary'])}\n")
            if entry["paper"]:
                parts.append(f"{_text(entry['paper'])}\n")
            rows = [
                (f"`{name}`", f"`{as_yaml(value)}`",
                 _text(entry["accepts"].get(name, "")), _text(entry["describes"].get(name, "")))
                for name, value in entry["parameters"].items()
            ]  # fmt: skip
            if rows:
                parts.append(table(("parameter", "value", "accepts", ""), rows) + "\n")
            others = [
                (", ".join(f"`{name}`" for name in names),
                 ", ".join(f"`{key}: {as_yaml(value)}`" for key, value in differing.items()))
                for names, differing in other_presets(entry)
            ]  # fmt: skip
            if others:
                parts.append(table(("other presets", "set"), others) + "\n")
    return "\n".join(parts)


#: What a page may ask for.
MADE = {"commands": commands, "keys": keys, "strategies": strategies}


# ---- pages of the repository's root ------------------------------------------------------------


def decisions() -> str:
    """List the pages of docs/adr by their titles."""
    pages = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
    titles = [(page.name, page.read_text(encoding="utf-8").splitlines()[0]) for page in pages]
    lines = [f"* [{title.lstrip('# ')}]({name})" for name, title in titles]
    head = "# Decisions\n\nWhat was the matter, what was decided, and why.\n"
    return "\n".join([head, *lines]) + "\n"


def house() -> str:
    """Return the README's map of the rooms as a page."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## The house\n")[1]
    fence = section.index("```", section.index("```text") + 3) + 3
    return "# The house\n" + section[:fence] + "\n"


def moved(path: Path) -> str:
    """Return a page of the repository's root with its links as the site has them."""

    def link(match: re.Match[str]) -> str:
        return f"]({MOVED.get(match[1], match[1].removeprefix('docs/'))})"

    return re.sub(r"\]\(([^):]+)\)", link, path.read_text(encoding="utf-8"))


# ---- Markdown beside each page, and llms.txt ---------------------------------------------------


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what a page wants of the code, `<!-- made: NAME -->`, and remember its Markdown.

    The line that says, to who reads the page as a file, where this part is to be seen goes.
    """
    there = re.sub(r"^> Made from the code.*\n\n", "", markdown, flags=re.M)
    filled = re.sub(r"<!-- made: (\w+) -->", lambda found: MADE[found[1]](), there)
    _sources[page.file.src_uri] = filled
    return filled


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Remember the order and the sections of pages."""
    _nav.append(nav)


def on_post_build(config: MkDocsConfig) -> None:
    """Write every page as Markdown, llms.txt (the list) and llms-full.txt (all of them)."""
    site = Path(config.site_dir)
    plain = {path: expanded(text) for path, text in _sources.items()}
    for path, text in plain.items():
        target = site / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    head = f"# {config.site_name}\n\n> {config.site_description}\n"
    (site / "llms.txt").write_text(head + "".join(_listed(_nav[-1].items, plain)), "utf-8")
    ordered = [page.file.src_uri for page in _nav[-1].pages]
    (site / "llms-full.txt").write_text("\n\n".join(plain[path] for path in ordered), "utf-8")


def _listed(items: list[Any], plain: dict[str, str]) -> Iterator[str]:
    for item in items:
        if isinstance(item, Section):
            yield f"\n## {item.title}\n\n"
            yield from _listed(item.children, plain)
        elif isinstance(item, Page):
            path = item.file.src_uri
            title = plain[path].lstrip().partition("\n")[0].lstrip("# ")
            yield f"{'' if item.parent else chr(10)}- [{title}]({path}): {_opening(plain[path])}\n"


def _opening(text: str) -> str:
    """Return the first sentence of a page's first paragraph."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    paragraphs = (part for part in prose.split("\n\n")[1:] if re.match(r"\s*[\w`\[]", part))
    return re.split(r"(?<=[.!?])\s", " ".join(next(paragraphs, "").split()))[0]


def expanded(text: str) -> str:
    """Return a page with its `::: name` lines replaced by signatures and docstrings."""
    return re.sub(r"^::: ([\w.]+)\n(?:    .*\n|\n(?=    ))*", _described, text, flags=re.M)


def _described(match: re.Match[str]) -> str:
    return "\n".join(_object(_packages()[match[1]], match[1])) + "\n"


@cache
def _packages() -> griffe.ModulesCollection:
    """Read the three packages' sources; names lead across them."""
    loader = griffe.GriffeLoader(search_paths=[ROOT, ROOT / "kernels"])
    for package in ("gradkernels", "gradstore", "dataflex"):
        loader.load(package)
    loader.resolve_aliases(external=False)
    return loader.modules_collection


def _object(found: griffe.Object | griffe.Alias, name: str) -> Iterator[str]:
    yield f"## {name}\n"
    if not found.is_module:
        yield f"```python\n{_signature(found)}\n```\n"
    if found.docstring:
        yield found.docstring.value + "\n"
    if found.is_module:
        for member in sorted(found.exports or found.members):
            yield from _object(found[str(member)], f"{name}.{member}")
    if found.is_class:
        for member in found.members.values():
            if member.is_function and member.docstring and not member.name.startswith("_"):
                yield f"```python\n{member.signature()}\n```\n\n{member.docstring.value}\n"


def _signature(found: griffe.Object | griffe.Alias) -> str:
    if found.is_attribute:
        return f"{found.name} = {found.value}"
    return f"class {found.signature()}" if found.is_class else str(found.signature())


# ---- words --------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Write a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in li) + " |" for li in lines
    )


def _text(words: str | None) -> str:
    """Return a help text on one line, its markup as plain characters."""
    line = " ".join((words or "").split())
    return line if "`" in line else re.sub(r"([<>\[\]*])", r"\\\1", line)
