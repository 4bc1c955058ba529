"""Gradient features and selection beside every peer: same model, adapter, rows and target, one run.

    uv run python examples/real/prepare.py              # weights and rows of SmolLM2
    uv run python benchmarks/against_peers.py           # two hours on two cores, most of it TRAK
    uv run python benchmarks/against_peers.py --parts slow --dim 512   # a quarter of an hour
    uv run python benchmarks/against_peers.py --parts dataflex         # three quarters
    uv run python benchmarks/against_peers.py --model tiny --rows 256
    uv run python benchmarks/against_peers.py --parts ours             # no other package

* *ours*: `gradstore.build` into a store, scores from it; the default feature, and LESS's own; and
  plain gradients of the base model's linear layers, as many numbers as bergson keeps of those.
* *dataflex 1.1.0*: PyPI's LESS selector, called as its trainer calls it.
* *LESS, TRAK*: the published recipe, a row at a time, through TRAK's `BasicProjector` in float16.
* *bergson build* and *trackstar* (PyPI, 2.5.1): its command lines; of the adapter (as ours), and of
  the base model's own linear layers, which is what it is made for, 16 x 16 a module.

PyPI's dataflex and bergson each get a virtual environment under runs/peers, made by `uv` when it is
not there. Every method is a process of its own, one at a time. Our seconds and those of LESS are of
the training rows' pass into a store (or a file), after the model is loaded (ours also after one of
few rows, which loads its libraries); bergson's commands are timed whole, once with all rows and
once with few, and the difference is the time of the others.
The fast ones run `--pairs` times in turns. The two that project through TRAK take only the first 16
rows, which is their buffer: a projection of fewer costs them the same, of SmolLM2's adapter a
half an hour and more. So only their pass over the training rows is made there, and their
scores are those on `--model tiny`.

*agreement*: Spearman correlation, over the rows that a method scored, with LESS's scores from whole
gradients of the adapter in float64 (cosine of Adam's step and target gradient, no projection; made
first, by `peers/exact.py`, in the time of a pass row by row), and how many of those scores' best 5%
it has among its own; the latter for methods that scored all rows.

Prints a line for each method and appends it to results/against_peers.csv: the fast ones', then each
of the other two as it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from report import RESULTS, append, echo, machine

Scores = npt.NDArray[np.float64]

HERE = Path(__file__).resolve().parent
PLACE = HERE.parent / "runs" / "peers"
PACKAGES = {"dataflex": ("dataflex[less]==1.1.0",), "bergson": ("bergson==2.5.1",)}
BUFFER = 16
SIDE = 16  # of bergson's projection of a module
FEW = 8  # rows of the second, short run of bergson; as peers/prepare.py makes them
TOP = 0.05
TOKENS = 2048  # of a padded batch, as ours on a CPU; bergson takes no more than the model's longest


@dataclass
class Method:
    """One way to score the rows of a run.

    Attributes:
        name: as the table shows it.
        seconds: of each measurement, for `rows` rows.
        rows: training rows whose time it is.
        figures: what it wrote: `peak_mib`, `row_bytes`, ...
        scores: (n,) of the first n training rows, if it scores any.
    """

    name: str
    rows: int = 0
    seconds: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    scores: Scores | None = None


def environment(name: str) -> Path:
    """Return the Python that has a peer's package; make it where it is not there.

    Without this project's configuration of uv, whose versions are not theirs.
    """
    python = PLACE / name / "bin" / "python"
    done = PLACE / f"{name}.installed"
    wanted = " ".join(PACKAGES[name])
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        echo(f"installing {wanted}")
        subprocess.run(["uv", "venv", "--no-config", "--quiet", "--clear", "--python", "3.11",
                        PLACE / name], check=True)  # fmt: skip
        subprocess.run(["uv", "pip", "install", "--no-config", "--quiet", "--python", python,
                        *PACKAGES[name]], check=True)  # fmt: skip
        done.write_text(wanted, encoding="utf-8")
    return python


class Bench:
    """A paused run in a folder, and the processes that are measured on it.

    Args:
        folder: of the run, see `peers/paused.py`.
        dim: d of every projection.
        threads: of every process.
    """

    def __init__(self, folder: Path, dim: int, threads: int) -> None:
        self.folder, self.dim = folder, dim
        self.train = json.loads((folder / "train.json").read_text(encoding="utf-8"))
        adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text("utf-8"))
        self.base = Path(adapter["base_model_name_or_path"])
        shared = {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
        }
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
        self.theirs = {k: v for k, v in os.environ.items() if k not in hidden} | shared
        self.ours = os.environ | shared

    def run(self, command: Sequence[object], *, ours: bool = False) -> tuple[float, float]:
        """Run one process to its end.

        Returns:
            Its seconds, and the most memory that it or a process of its had, in MiB.

        Raises:
            RuntimeError: it failed; with the end of what it printed.
        """
        log = self.folder / "log.txt"
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT,
                env=self.ours if ours else self.theirs, cwd=self.folder,
            )  # fmt: skip
            _, status, used = os.wait4(process.pid, 0)
        if status:
            said = log.read_text(encoding="utf-8", errors="replace")[-6000:]
            raise RuntimeError(f"{command} failed:\n{said}")
        return time.perf_counter() - start, used.ru_maxrss / 1024

    def driver(self, method: Method, script: str, python: object, *arguments: object) -> None:
        """Measure a script of peers/ that loads the run and writes NAME.json and NAME.npy."""
        file = method.name.replace(" ", "_").replace(",", "")
        command = [python, HERE / "peers" / script, self.folder, file, *arguments]
        _, peak = self.run(command, ours=python == sys.executable)
        text = (self.folder / f"{file}.json").read_text(encoding="utf-8")
        method.figures = json.loads(text) | {"peak_mib": peak}
        method.rows = int(method.figures["rows"])
        method.seconds.append(method.figures["seconds"])
        scores = self.folder / f"{file}.npy"
        method.scores = np.load(scores) if scores.is_file() else None

    def bergson(self, method: Method, python: Path, command: Sequence[str], model: Path) -> None:
        """Measure one of bergson's commands: all rows, and few of them."""
        took = {}
        for rows in ("all", "few"):
            with tempfile.TemporaryDirectory(prefix="bergson-", dir=self.folder) as out:
                place = Path(out) / "out"
                line = [python, "-m", "bergson", command[0], place, *command[1:]]
                line += ["--model", model, "--tokenizer", self.base]
                scoring = command[0] == "trackstar"
                line += ["--data.dataset" if scoring else "--dataset", self.folder / rows]
                if scoring:
                    line += ["--query.dataset", self.folder / "queries"]
                    line += ["--query.aggregation", "none"]
                took[rows], peak = self.run(line)
                if rows == "all":
                    size = sum(f.stat().st_size for f in place.rglob("*.bin") if f.is_file())
                    method.figures = {"row_bytes": size / len(self.train), "peak_mib": peak}
                    method.scores = scores_of(place / "scores") if scoring else None
        method.rows = len(self.train) - FEW
        method.seconds.append(took["all"] - took["few"])

    def exact(self) -> Scores:
        """Compute the scores that all others are compared with: (n,) of the training rows."""
        self.run([sys.executable, HERE / "peers" / "exact.py", self.folder], ours=True)
        found: Scores = np.load(self.folder / "exact.npy")
        return found

    def tokens(self, rows: int) -> float:
        """Tokens of so many training rows, by the mean of all."""
        return rows * statistics.mean(len(row["input_ids"]) for row in self.train)


def scores_of(folder: Path) -> Scores:
    """Read bergson's scores: (n,) the mean over the queries."""
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    records = np.fromfile(folder / "scores.bin", dtype=np.dtype(info["dtype"]))
    names = [f"score_{query}" for query in range(info["num_scores"])]
    found: Scores = np.stack([records[name] for name in names]).mean(axis=0, dtype=np.float64)
    return found


def fast_ones(bench: Bench, pairs: int, parts: str) -> list[Method]:
    """Measure ours and bergson's in turns; where slow ones are the part, one of ours, once."""
    python = environment("bergson") if parts in ("all", "fast") else Path()
    adapter = bench.folder / "adapter"
    longest = json.loads((bench.base / "config.json").read_text("utf-8"))["max_position_embeddings"]
    side = ("--projection_dim", str(SIDE), "--token_batch_size", str(min(TOKENS, longest)))
    ours: list[tuple[str, str, str, str, int]] = [
        ("ours, sjlt", "adapter", "adam_marginal", "sjlt", bench.dim),
        ("ours, dense", "adapter", "adam_marginal", "rademacher", bench.dim),
        ("ours, published Adam, sjlt", "adapter", "adam", "sjlt", bench.dim),
        ("ours, base model's linear layers", "base", "sgd", "sjlt", SIDE**2),
    ]
    peers = [
        ("bergson build, base model", ("build", *side), bench.base),
        ("bergson build, adapter", ("build", *side), adapter),
        ("bergson trackstar, adapter", ("trackstar", *side), adapter),
    ]
    if parts not in ("all", "fast"):
        peers = []
    if parts not in ("all", "fast", "ours"):
        ours, pairs = ours[:1], 1
    names = [name for name, *_ in ours] + [name for name, *_ in peers]
    found = {name: Method(name) for name in names}
    for turn in range(1, pairs + 1):
        for name, *settings in ours:
            bench.driver(found[name], "ours.py", sys.executable, *settings)
            echo(f"turn {turn} of {pairs}: {name} {found[name].seconds[-1]:.1f} s")
        for name, command, weights in peers:
            bench.bergson(found[name], python, command, weights)
            echo(f"turn {turn} of {pairs}: {name} {found[name].seconds[-1]:.1f} s")
    return list(found.values())


def slow_ones(bench: Bench, model: str, parts: str) -> Iterator[Method]:
    """Measure, one by one, what projects through TRAK."""
    rows = min(BUFFER, len(bench.train))
    what = "scores" if model == "tiny" else "time"
    for part, name, script in (
        ("less", "LESS, TRAK", "published_less.py"),
        ("dataflex", "dataflex 1.1.0", "dataflex_less.py"),
    ):
        if parts not in (part, "slow", "all"):
            continue
        python = environment(part) if part in PACKAGES else Path(sys.executable)
        method = Method(name)
        bench.driver(method, script, python, rows, bench.dim, what)
        echo(f"{name} {method.seconds[-1]:.1f} s for {rows} rows")
        yield method


def lines(
    bench: Bench, found: Sequence[Method], ours: Method, exact: Scores, first: dict[str, Any]
) -> list[dict[str, Any]]:
    """One line a method: speed, that of ours beside it, agreement, memory and bytes."""
    speed = ours.rows / statistics.median(ours.seconds)
    made = []
    for method in found:
        seconds = statistics.median(method.seconds)
        made.append(
            first
            | {
                "method": method.name,
                "d": round(method.figures.get("d", bench.dim)),
                "rows": method.rows,
                "measurements": len(method.seconds),
                "seconds": round(seconds, 2),
                "seconds_min": round(min(method.seconds), 2),
                "seconds_max": round(max(method.seconds), 2),
                "rows_s": round(method.rows / seconds, 4),
                "tokens_s": round(bench.tokens(method.rows) / seconds, 2),
                "ours_over": round(speed * seconds / method.rows, 2),
                "peak_mib": round(method.figures["peak_mib"])
                if "peak_mib" in method.figures
                else "",
                "row_bytes": round(method.figures["row_bytes"]),
                **agreement(method.scores, exact),
            }
        )
    return made


def agreement(scores: Scores | None, exact: Scores) -> dict[str, float | str]:
    """Compare scores with the exact ones of the same rows."""
    from scipy import stats

    if scores is None:
        return {"spearman": "", "top": ""}
    n = len(scores)
    spearman = round(float(stats.spearmanr(scores, exact[:n]).statistic), 4)
    if n < len(exact):
        return {"spearman": spearman, "top": ""}
    k = max(1, round(TOP * n))
    best = [set(np.argsort(-each, kind="stable")[:k].tolist()) for each in (scores, exact)]
    return {"spearman": spearman, "top": round(len(best[0] & best[1]) / k, 4)}


def main() -> None:
    """Run the benchmark; lines are appended to the CSV as soon as they are measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--rows", type=int, default=64, help="training rows (default 64)")
    parser.add_argument("--pairs", type=int, default=3, help="turns of the fast ones (default 3)")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--parts", default="all",
                        choices=("all", "fast", "ours", "slow", "less", "dataflex"),
                        help="slow: the two that project by TRAK; or one of them")  # fmt: skip
    parser.add_argument("--csv", type=Path, default=RESULTS / "against_peers.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        folder = Path(temporary)
        echo(f"{options.model}: a run to compare on")
        # In a process of its own: what a child uses is counted from its parent's memory on.
        prepare = [sys.executable, HERE / "peers" / "prepare.py", folder, options.model]
        subprocess.run([*prepare, str(options.rows), str(FEW)], check=True)
        bench = Bench(folder, options.dim, options.threads)
        first = machine(options.threads) | {"model": options.model}
        echo("LESS's scores from whole gradients")
        exact = bench.exact()
        found = fast_ones(bench, options.pairs, options.parts)
        results = lines(bench, found, found[0], exact, first)
        append(options.csv, results)
        for method in slow_ones(bench, options.model, options.parts):
            results += lines(bench, [method], found[0], exact, first)
            append(options.csv, results[-1:])
    echo(f"\n{results[0]['cpu']}, {options.threads} threads, load {results[0]['load']}")
    for row in results:
        echo(
            f"{row['method']:<28}{row['rows_s']:>9} rows/s{row['tokens_s']:>10} tokens/s"
            f"  ours is {row['ours_over']:>8} x  {row['row_bytes']:>7} bytes a row"
            f"  {row['peak_mib']:>6} MiB  spearman {row['spearman']}  top 5% {row['top']}"
        )


if __name__ == "__main__":
    main()
