"""The notebooks: they run from a fresh clone, and what is committed is what they show."""

from __future__ import annotations

import base64
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

#: What takes a kernel longest.
IMPORTED = ("ipykernel.kernelapp", "pandas", "transformers.trainer",
            "dataflex.launch.explain", "dataflex.integrations", "gradstore")  # fmt: skip

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]

#: Bytes of a notebook, and of one figure in it.
LARGEST, LARGEST_FIGURE = 400_000, 100_000

#: A folder of some machine: no text of ours holds one.
ABSOLUTE = re.compile(r"(?<![\w.<>/-])(?:/[\w.-]+){2,}/|[A-Z]:\\\\")


@pytest.fixture(scope="module")
def refresh() -> ModuleType:
    """The script that runs notebooks."""
    spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def outputs(notebook: Any) -> list[list[tuple[str, ...]]]:
    """Of each cell of code, the kinds of what it shows: the forms of a value, or the stream."""
    return [
        [tuple(sorted(output.get("data", [output.output_type]))) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def words(notebook: Any) -> str:
    """Everything in a notebook that is text."""
    found = []
    for cell in notebook.cells:
        found.append(cell.source)
        for output in cell.get("outputs", ()):
            found += [t for kind, t in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(found)


def test_there_are_the_five_that_the_readme_promises() -> None:
    assert [name[:2] for name in NAMES] == ["1-", "2-", "3-", "4-", "5-"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_committed_notebook_shows_frames_and_figures_and_no_noise(path: Path) -> None:
    """That every cell ran, from the top, is .ci/check_notebooks.py's to say."""
    kinds = {kind for cell in outputs(read(path)) for output in cell for kind in output}
    assert kinds <= {"text/plain", "text/html", "image/png"}, "a stream, a warning or an error"
    assert "image/png" in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_committed_notebook_says_nothing_about_the_machine(
    path: Path, refresh: ModuleType
) -> None:
    notebook = read(path)
    assert not ABSOLUTE.findall(words(notebook))
    normal = read(path)
    refresh.normalise(normal)
    assert notebook == normal


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_committed_notebook_is_small(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    for cell in read(path).cells:
        for output in cell.get("outputs", ()):
            figure = output.get("data", {}).get("image/png", "")
            assert len(base64.b64decode(figure)) < LARGEST_FIGURE, cell.source


class Kernel:
    """A kernel's process, as jupyter_client uses one."""

    stdin = stdout = stderr = None

    def __init__(self, forks: Any, log: Path, command: list[str], more: dict[str, Any]) -> None:
        self._forks = forks
        self._ended: int | None = None
        self.pid = forks(*command[1:], program="python", imports=IMPORTED, group=True,
                         env=more["env"], cwd=Path(more["cwd"]), background=log).code  # fmt: skip

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        if self._ended is None:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return self.wait() if state == "Z" else None
        return self._ended

    def wait(self) -> int:
        """Wait for its exit code."""
        if self._ended is None:
            self._ended = self._forks.ended(self.pid)
        return self._ended


@pytest.fixture
def forked_kernels(
    processes: Any, refresh: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Let each notebook have a kernel of its own, and all of them one time of imports."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # As a kernel sets it, before matplotlib is imported.
    shown = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    forks = processes.Cli(tmp_path, TMPDIR=str(tmp_path), **refresh.QUIET, **shown)

    def launch(command: list[str], **more: Any) -> Kernel:
        return Kernel(forks, tmp_path / "kernel.log", command, more)

    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", launch)
    yield
    forks.close()


@pytest.fixture
def fewer_rows(tmp_path: Path, model: Path) -> Path:
    """A copy of the notebooks whose run has fewer rows: of each kind, and of each skill, still.

    Their model has the first two layers of the embedded one.
    """
    examples = tmp_path / "clone" / "examples"
    folder = shutil.copytree(
        FOLDER, examples / "notebooks", ignore=shutil.ignore_patterns("runs", "__pycache__")
    )
    (examples / "tiny").mkdir()
    (examples / "tiny" / "data").symlink_to(FOLDER.parent / "tiny" / "data")
    (examples / "tiny" / "model").symlink_to(model)
    run = (folder / "run.yaml").read_text()
    assert "max_samples: 800\n" in run
    (folder / "run.yaml").write_text(run.replace("max_samples: 800\n", "max_samples: 240\n"))
    return folder


@pytest.mark.usefixtures("forked_kernels")
def test_every_notebook_runs_and_shows_what_is_committed(
    refresh: ModuleType, fewer_rows: Path
) -> None:
    """In one test, since the first that needs the training run makes it for the others."""
    for path in NOTEBOOKS:
        assert outputs(refresh.executed(fewer_rows / path.name)) == outputs(read(path)), path.name
    (run,) = (fewer_rows / "runs").iterdir()
    assert (run / "train_results.json").is_file()
