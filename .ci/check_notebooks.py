"""Check that notebooks are committed as they ran: every cell, from the top, without an error.

    python .ci/check_notebooks.py [NOTEBOOK ...]     # default: all below examples/

Exits 1 with a line for each fault.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def faults(notebook: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a notebook's code cells and their outputs."""
    cells = [
        (number, cell)
        for number, cell in enumerate(notebook["cells"], start=1)
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
    ]
    for order, (number, cell) in enumerate(cells, start=1):
        count = cell.get("execution_count")
        if count is None:
            yield f"cell {number} was not run"
        elif count != order:
            yield f"cell {number} was run as number {count}, not {order}: run all, from the top"
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"cell {number} ended with {output['ename']}: {output['evalue']}"
            if output["output_type"] == "stream" and output["name"] == "stderr":
                yield f"cell {number} wrote to stderr: {''.join(output['text'])[:80]!r}"
    if not any(cell["outputs"] for _, cell in cells):
        yield "no cell has an output: run it, then save it"


def main(names: Sequence[str]) -> int:
    """Check the notebooks named, or all below examples/; return the exit code."""
    paths = [Path(name) for name in names] or sorted((ROOT / "examples").rglob("*.ipynb"))
    found = [f"{path}: {fault}" for path in paths for fault in faults(json.loads(path.read_text()))]
    sys.stdout.write("".join(f"{line}\n" for line in found))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
