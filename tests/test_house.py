"""The house rules that a linter does not know: sizes, words and the map in the README."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dataflex", "gradstore", "kernels/gradkernels")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

LINES_OF_A_FILE = 350
LINES_OF_A_FUNCTION = 60
PARAMETERS = 8

#: Rooms whose classes' constructors are what a user writes under component_params.
STRATEGIES = ("selectors", "mixers", "weighters", "reorders", "pipelines")

#: A kernel has no other way to be given its pointers, strides and sizes than one by one.
KERNEL = "triton.jit"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Every function of a file, with the class it is a method of."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    methods = {
        id(child): node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for child in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node, methods.get(id(node))


def parameters(function: Function, owner: ast.ClassDef | None) -> int:
    """Parameters a caller gives: without self or cls."""
    arguments = function.args
    count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
    static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    return count - (owner is not None and not static)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_stay_small(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LINES_OF_A_FILE, f"{path.name} has {lines} lines: more than one idea?"
    room = path.relative_to(ROOT).parts[1]
    for function, owner in functions(path):
        where = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        strategy = room in STRATEGIES and owner is not None and function.name == "__init__"
        size = (function.end_lineno or function.lineno) - function.lineno + 1
        assert size <= LINES_OF_A_FUNCTION, f"{where} has {size} lines"
        count = parameters(function, owner)
        kernel = any(KERNEL in ast.unparse(d) for d in function.decorator_list)
        assert count <= PARAMETERS or strategy or kernel, f"{where} takes {count} parameters"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_loggers_have_one_style(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            first = (ast.get_docstring(node) or "").split("\n")[0]
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
            opening = re.match(r"(What|Whether|Whose|Which|Who|How|Where|When|Why)\b", first)
            assert opening is None, f"{where}: {first!r} is a question, not a name or an action"
        if isinstance(node, ast.Assign) and "getLogger(__name__)" in ast.unparse(node.value):
            assert ast.unparse(node.targets[0]) == "_log", f"{path.relative_to(ROOT)}: logger name"


def test_every_room_says_what_lives_there_and_is_on_the_map() -> None:
    house = (ROOT / "README.md").read_text(encoding="utf-8").split("## The house")[1]
    for package in PACKAGES:
        for folder in sorted((ROOT / package).glob("*/")):
            if not any(folder.glob("*.py")):
                continue
            opening = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
            assert opening, f"{folder.relative_to(ROOT)}/__init__.py says nothing"
            if package != "kernels/gradkernels":
                assert f"{folder.name}/" in house, f"{folder.name}/ is missing in the README"


def test_tests_lie_in_the_room_they_test() -> None:
    for package in ("dataflex", "gradstore"):
        rooms = {folder.name for folder in (ROOT / package).glob("*/") if any(folder.glob("*.py"))}
        tested = {
            folder.name
            for folder in (ROOT / "tests" / f"{package}_").glob("*/")
            if any(folder.glob("test_*.py"))
        }
        assert tested <= rooms, f"tests/{package}_ has rooms that {package} lacks: {tested - rooms}"


def test_every_mutant_names_one_place_of_the_code_and_tests_that_exist() -> None:
    """mutants.py runs by hand: here a change that leaves one of them behind is told at once."""
    for mutant in runpy.run_path(str(ROOT / "tests" / "mutants.py"))["MUTANTS"]:
        found = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.text)
        assert found == 1, f"{mutant.file} holds {mutant.text!r} {found} times"
        for test in mutant.tests.split():
            file, _, name = test.partition("::")
            assert (ROOT / file).exists(), f"no {test}"
            assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test


#: Imported, and declared by nobody: triton is torch's on Linux alone, and plain torch stands in for
#: it elsewhere; DeepSpeed is of who trains with it.
NOT_OURS_TO_DECLARE = {"triton", "deepspeed"}


def imported() -> set[str]:
    """Packages that the code imports, beside Python's own and ours."""
    found: set[str] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    ours = {Path(package).name for package in PACKAGES}
    return found - set(sys.stdlib_module_names) - ours


def test_what_the_code_imports_is_declared_and_what_is_installed_is_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [each for more in project["optional-dependencies"].values() for each in more]
    declared = {
        requirement.name: requirement
        for requirement in map(Requirement, [*project["dependencies"], *extras])
        if requirement.marker is None or requirement.marker.evaluate()
    }
    distributions = packages_distributions()
    for package in sorted(imported() - NOT_OURS_TO_DECLARE):
        names = {name.lower().replace("_", "-") for name in distributions[package]}
        assert names & set(declared), f"{package} ({', '.join(names)}) is not in pyproject.toml"
        for name in names & set(declared):
            assert version(name) in declared[name].specifier, name
