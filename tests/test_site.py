"""The site of docs/: it builds, loads nothing from elsewhere, and says what the program says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gradkernels
import pytest
import typer

import dataflex.api
import dataflex.integrations
import gradstore
import gradstore.evaluation
import gradstore.replay
from dataflex.cli import app
from dataflex.config.keys import DataFlexConfig
from dataflex.launch.components import as_yaml, catalogue

ROOT = Path(__file__).resolve().parents[1]

#: Each has a page of its public names.
PACKAGES = (dataflex.api, dataflex.integrations, gradkernels, gradstore, gradstore.evaluation,
            gradstore.replay)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as CI does: a link, an anchor or a name that leads nowhere ends it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, **paths}, capture_output=True,
                           text=True)  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Loads(HTMLParser):
    """Collector of what a browser loads by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.found.append(given.get("src") or "")
        if tag == "link":
            self.found.append(given.get("href") or "")
        self.found += re.findall(r"url\(([^)]+)\)", given.get("style") or "")


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.found
        assert not [at for at in loads.found if re.match(r"(https?:)?//", at)], page.name
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import\s*)[\"']?(https?:)?//", text), sheet.name


def test_every_page_lies_there_as_markdown_and_is_listed(site: Path) -> None:
    listed = set(re.findall(r"\]\(([^)]+)\): \S", (site / "llms.txt").read_text()))
    pages = {page.relative_to(site).with_suffix(".md") for page in site.rglob("*.html")}
    pages -= {Path("404.md")}
    for page in pages:
        text = (site / page).read_text(encoding="utf-8")
        assert text.lstrip().startswith("# "), f"{page} has no title"
        assert ":::" not in text, f"{page} names what it should show"
        assert str(page) in listed or re.match(r"adr/\d", str(page)), f"llms.txt lacks {page}"
    full = (site / "llms-full.txt").read_text(encoding="utf-8")
    assert all((site / page).read_text(encoding="utf-8") in full for page in map(Path, listed))


def test_a_page_of_the_reference_says_where_it_is_read_as_a_file_that_the_site_has_it(
    site: Path,
) -> None:
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        assert "`uv run mkdocs serve` shows it" in page.read_text(encoding="utf-8"), page.name
        assert "mkdocs serve" not in (site / "reference" / page.name).read_text(encoding="utf-8")


def commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its words."""
    inner = getattr(command, "commands", {})
    for name, each in inner.items():
        yield from commands(each, (*words, name))
    if not inner:
        yield " ".join(words), command


def test_the_reference_has_every_command_option_and_key(site: Path) -> None:
    page = (site / "reference" / "commands.md").read_text(encoding="utf-8")
    told = {part.partition("\n")[0]: part for part in page.split("\n## ")[1:]}
    known = dict(commands(typer.main.get_command(app), ("dataflex-cli",)))
    assert set(told) == set(known)
    for words, command in known.items():
        for option in (p for p in command.params if p.param_type_name == "option"):
            assert all(f"`{name}`" in told[words] for name in option.opts), (words, option.opts)
    keys = (site / "reference" / "keys.md").read_text(encoding="utf-8")
    assert [k for k in DataFlexConfig.__dataclass_fields__ if f"| `{k}` |" not in keys] == []


def test_the_reference_has_every_strategy_with_the_values_that_a_run_gets(site: Path) -> None:
    page = (site / "reference" / "strategies.md").read_text(encoding="utf-8")
    told = {part.partition("\n")[0]: part for part in page.split("\n### ")[1:]}
    for entry in catalogue():
        part = told[f"{entry['kind']}: {entry['name']}"]
        for key, value in entry["parameters"].items():
            assert f"| `{key}` | `{as_yaml(value)}` |" in part, (entry["name"], key)
        for name in entry["presets"]:
            assert f"`{name}`" in part or name == entry["name"]


@pytest.mark.parametrize("package", PACKAGES, ids=[package.__name__ for package in PACKAGES])
def test_every_public_name_is_on_its_page(package: Any, site: Path) -> None:
    name = package.__name__
    page = site / "reference" / name.replace(".", "-")
    html, text = (page.with_suffix(end).read_text(encoding="utf-8") for end in (".html", ".md"))
    for public in package.__all__:
        assert f'id="{name}.{public}"' in html
        assert f"## {name}.{public}\n" in text
