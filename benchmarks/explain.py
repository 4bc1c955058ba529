"""Seconds from a question to its rows: the whole command, and a model that is loaded already.

    uv run python benchmarks/explain.py                   # two minutes

The README's first run (the embedded model, 1,600 rows, d = 4096) is trained once. *Cold*: the
command `dataflex-cli gradstore explain`, interpreter, imports and model included, once unmeasured
(Python compiles its files then) and then five times. *Warm*: `Explainer.explain` of one process,
another question each time; medians. Appends to results/explain.csv; exits 1
beyond 10 s or 0.5 s.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import RESULTS, append, echo, machine, timed

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/train_lora/selectors/less.yaml"
COLD, WARM = 5, 40
LIMIT_COLD, LIMIT_WARM = 10.0, 0.5


def main() -> int:
    """Write the figures, print them; 1 if a limit is missed."""
    # With this set, every process compiles every file it imports anew: twice the time.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = (sys.executable, "-m", "dataflex")

    def run(*arguments: object) -> None:
        subprocess.run([*command, *map(str, arguments)], env=environment, check=True,
                       capture_output=True)  # fmt: skip

    with tempfile.TemporaryDirectory(prefix="explain-") as folder:
        run("train", EXAMPLE, f"output_dir={folder}/run")
        store = Path(folder, "run", "gradstore")

        def ask() -> None:
            run("gradstore", "explain", store, "--prompt", "386 and 507", "--response", "893")

        ask()
        cold = [timed(ask).wall for _ in range(COLD)]
        warm = asked_in_one_process(store)
    line: dict[str, Any] = machine() | {
        "cold_s": round(statistics.median(cold), 2), "cold_s_max": round(max(cold), 2),
        "colds": COLD, "warm_s": round(statistics.median(warm), 3),
        "warm_s_max": round(max(warm), 3), "warms": len(warm),
    }  # fmt: skip
    append(RESULTS / "explain.csv", [line])
    echo(", ".join(f"{key} {value}" for key, value in line.items()))
    return int(line["cold_s"] > LIMIT_COLD or line["warm_s"] > LIMIT_WARM)


def asked_in_one_process(store: Path) -> list[float]:
    """Return the seconds of each question after the first."""
    from dataflex import open_model

    model = open_model(store)
    model.explain("386 and 507", "893")

    def ask(number: int) -> None:
        model.explain(f"{number} and 507", str(number + 507))

    return [timed(lambda n=n: ask(n)).wall for n in range(WARM)]  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main())
