"""What the README and the docs say is true of the repository beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dataflex import bridge
from dataflex.config import DataFlexConfig, load
from dataflex.preflight import check
from dataflex.registry import resolve

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
YAMLS = sorted((ROOT / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_file_that_a_page_names_exists() -> None:
    rooms = "dataflex|gradstore|kernels|examples|benchmarks|\\.ci"
    named = re.compile(rf"`((?:{rooms})/[\w./-]+\.(?:py|yaml|md))`")
    for page in PAGES:
        for path in named.findall(page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_readmes_keys_are_accepted() -> None:
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert diff is not None
    lines = [line[1:] for line in diff[1].splitlines()]
    content = yaml.safe_load("\n".join(lines))
    own = set(DataFlexConfig.__dataclass_fields__)
    assert set(content) <= own | bridge.accepted_keys()
    added = {line[1:].split(":")[0] for line in diff[1].splitlines() if line.startswith("+")}
    assert {key for key in added if not key.startswith(" ")} <= own
    resolve(content["train_type"], content["component_name"], content["component_params"]).build()


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_example_configuration_passes_its_checks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load(path, [], bridge.accepted_keys())
    if (ROOT / str(config.get("model_name_or_path"))).is_dir():  # the real one has to be made first
        check(config)
