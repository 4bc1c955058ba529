"""What the README and the docs say is true of the repository beside them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from dataflex import __version__
from dataflex.bridge import arguments
from dataflex.config.keys import DataFlexConfig, load
from dataflex.config.presets import resolve
from dataflex.launch.preflight import check
from dataflex.pipelines.stages import ACCEPTED

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
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
    assert set(content) <= own | arguments.accepted_keys()
    added = {line[1:].split(":")[0] for line in diff[1].splitlines() if line.startswith("+")}
    assert {key for key in added if not key.startswith(" ")} <= own
    resolve(content["train_type"], content["component_name"], content["component_params"]).build()


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_example_configuration_passes_its_checks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load(path, [], arguments.accepted_keys())
    if (ROOT / str(config.get("model_name_or_path"))).is_dir():  # the real one has to be made first
        check(config)


#: Keys whose value suits a model and data of a size.
OF_A_SIZE = re.compile(
    r"^(?:output_dir|learning_rate|lr_scheduler_type|save_steps|target_dataset|warmup_step"
    r"|update_step|update_times|train_step): .*",
    flags=re.M,
)

#: Values of theirs that suit any: no warm-up, and a choice at every step.
OF_ANY = re.compile(r"warmup_step: 0$|update_step: 1 ")


@pytest.mark.parametrize(
    "path",
    [path for path in YAMLS if "/train_" in str(path)],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_an_example_marks_what_suits_the_embedded_model_alone(path: Path) -> None:
    head, _, body = path.read_text().partition("### model")
    assert 'marked "tiny"' in head.replace("\n# ", " ")
    lines = [line for line in OF_A_SIZE.findall(body) if not OF_ANY.match(line)]
    assert len(lines) >= 5
    assert not [line for line in lines if "  # tiny" not in line]


#: What looks at every strategy and every example; a strategy that is added has to pass it.
ENUMERATING = (
    "tests/integration/test_examples.py::test_there_is_an_example_of_every_strategy",
    "tests/dataflex_/config/test_registry.py"
    "::test_every_strategy_documents_every_parameter_and_no_other",
    "tests/dataflex_/test_docs.py::test_every_example_configuration_passes_its_checks"
    "[examples/train_lora/selectors/shortest.yaml]",
)


def followed(page: str, copied: Sequence[str], more: Sequence[str], folder: Path) -> list[str]:
    """Follow the example of a page in a copy of folders; run its test, the last, and `more`.

    Returns:
        The files that the example touches, then what pytest said.
    """
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.S)
    assert diff is not None
    for part in copied:
        shutil.copytree(ROOT / part, folder / part)
    for test in {test.partition("::")[0] for test in more}:
        (folder / test).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / test, folder / test)
    subprocess.run(["git", "apply", "-"], input=diff[1], text=True, check=True, cwd=folder)
    touched = re.findall(r"^\+\+\+ b/(\S+)", diff[1], flags=re.M)
    inherited = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               f"--rootdir={folder}", "--import-mode=importlib", touched[-1], *more]  # fmt: skip
    found = subprocess.run(command, cwd=folder, env=inherited, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return [*touched, found.stdout]


def test_adding_a_strategy_takes_one_file_one_preset_one_example_and_one_test(
    tmp_path: Path,
) -> None:
    """The example of docs/add-a-strategy.md, applied to a copy of the package and run."""
    copied = ("dataflex", "examples")
    *touched, told = followed("add-a-strategy.md", copied, ENUMERATING, tmp_path)
    assert touched == [
        "dataflex/selectors/shortest.py",
        "dataflex/config/components.yaml",
        "examples/train_lora/selectors/shortest.yaml",
        "tests/dataflex_/selectors/test_shortest.py",
    ]
    assert "13 passed" in told  # its own two, five kinds twice, and the example's


def test_adding_a_preconditioner_takes_one_file_one_name_and_one_test(tmp_path: Path) -> None:
    """The example of docs/add-a-preconditioner.md, applied to a copy of the package and run."""
    *touched, told = followed("add-a-preconditioner.md", ("gradstore",), (), tmp_path)
    assert touched == [
        "gradstore/scoring/diagonal.py",
        "gradstore/scoring/preconditioners.py",
        "tests/gradstore_/scoring/test_diagonal.py",
    ]
    assert "2 passed" in told


def test_the_pipeline_on_its_page_can_be_built() -> None:
    page = (ROOT / "docs" / "pipelines.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", page, flags=re.S)
    assert block is not None
    content = yaml.safe_load(block[1])
    args = (content[key] for key in ("train_type", "component_name", "component_params"))
    built = resolve(*args).build()
    assert built.describe() == "selector loss -> mixer odm, samples weighted by loss"
    accepted = {key for keys in ACCEPTED.values() for key in keys} - {"component_params"}
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.M)) == accepted


def test_the_citation_names_this_release() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__


def test_every_worked_number_of_the_specification_has_a_test() -> None:
    """E1 to E35, each in the name of a test: a comment that mentions a number checks nothing."""
    files = set((ROOT / "tests").rglob("test_*.py")) - {Path(__file__).resolve()}
    tests = [name for path in files for name in re.findall(r"\bdef (test_\w+)", path.read_text())]
    named = {int(n) for test in tests for n in re.findall(r"_e(\d+)(?=_|$)", test)}
    missing = sorted(set(range(1, 36)) - named)
    assert not missing, f"no test is named after the worked numbers {missing}"
