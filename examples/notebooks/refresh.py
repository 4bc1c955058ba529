"""Run the notebooks and keep what they show.

    uv run python examples/notebooks/refresh.py [NOTEBOOK.ipynb ...]

Without names, all of them, in place. They share one training run, in `runs/` beside them, which git
ignores; remove it to have it made anew.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent

#: Seconds a cell may take, on a machine that has other work, too.
LIMIT = 600

#: Bars of loading, advice on training and tqdm's advice to install widgets are no result.
QUIET = {
    "LLAMAFACTORY_VERBOSITY": "ERROR",
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its own folder and return it with its outputs.

    Args:
        path: the notebook; it is only read.

    Raises:
        CellExecutionError: a cell failed; its traceback.
        CellTimeoutError: a cell took longer than LIMIT.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=LIMIT, record_timing=False, resources=resources)
    client.execute(env={**os.environ, **QUIET})
    normalise(notebook)
    return notebook


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from machine to machine, and number the cells."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})


def main(names: list[str]) -> None:
    """Run the named notebooks, or all, in place."""
    for path in [Path(name) for name in names] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(executed(path), path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
