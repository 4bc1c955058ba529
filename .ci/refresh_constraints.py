"""Pin every transitive dependency in pyproject.toml's `[tool.uv] constraint-dependencies`.

    python .ci/refresh_constraints.py

No uv.lock is committed, because it would write a package index's addresses into the repository. The
pins are what uv resolves today without the old ones. It ends by importing what LlamaFactory's
commands import: versions that resolve together do not always import together. Run the tests before
committing them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "# BEGIN constraints (made by .ci/refresh_constraints.py)\n"
END = "# END constraints\n"

#: Modules that LlamaFactory's commands import when they run.
IMPORTED = (
    "llamafactory.api.app",
    "llamafactory.chat.chat_model",
    "llamafactory.extras.env",
    "llamafactory.train.tuner",
    "llamafactory.webui.interface",
)


def resolved(pyproject: str) -> list[str]:
    """`name==version ; marker` of everything uv resolves for a pyproject without constraints."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(pyproject, encoding="utf-8")
        for name in ("README.md", "LICENSE"):
            Path(folder, name).touch()
        found = subprocess.run(
            ["uv", "export", "--no-hashes", "--no-header", "--no-annotate", "--no-emit-project",
             "--all-groups", "--all-extras", "--quiet"],
            cwd=folder, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    return sorted(line.strip().replace('"', "'") for line in found.splitlines() if "==" in line)


def main() -> None:
    """Replace the block of constraints in pyproject.toml."""
    path = ROOT / "pyproject.toml"
    text = re.sub(f"\n?{re.escape(BEGIN)}.*?{re.escape(END)}", "", path.read_text(), flags=re.S)
    pins = "".join(f'    "{pin}",' + "\n" for pin in resolved(text))
    block = f"\n{BEGIN}[tool.uv]\nconstraint-dependencies = [\n{pins}]\n{END}"
    path.write_text(text.rstrip("\n") + "\n" + block, encoding="utf-8")
    subprocess.run(["uv", "sync", "--quiet"], cwd=ROOT, check=True)
    script = f"import {', '.join(IMPORTED)}"
    subprocess.run(["uv", "run", "python", "-c", script], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
