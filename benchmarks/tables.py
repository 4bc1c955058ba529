"""Tables of README.md and docs/figures.md, written from results/*.csv.

    uv run python benchmarks/tables.py              # rewrites both pages
    uv run python benchmarks/tables.py --check      # exits 1 where a page says something else

A page holds `<!-- figures: NAME -->` ... `<!-- end -->`; what stands between is the table of that
name, made of the newest lines of its CSV, with the machine they were measured on. A difference is
bold only where seeds carry it: a paired t test against the table's reference, corrected by Holm's
method for the comparisons of the table, at 5%.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from report import RESULTS, echo, read

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "figures.md")
LEVEL = 0.05

#: Spread of differences, relative to the figures, that rounding may have made.
FLAT = 1e-9

#: What `scale` calculates for; USD for an hour of a core, an assumption.
FAR_ROWS, FAR_CHECKPOINTS, PRICE = 1e9, 4, 0.04

#: Cores of a node, and hours in which the nodes that `scale` counts shall be done.
NODE_CORES, NODE_HOURS = 64, 24

#: A second pass over the same rows, which the sum leaves out.
SCANNED_AGAIN = "scan, in memory and checked"

#: Smallest speed of a scan from disk beside reading the same files.
SCALE_LIMIT = 0.8

#: Stands for a figure that older lines of a CSV do not have.
UNKNOWN = "not recorded"

#: Stands for a table whose CSV has no line yet.
NOT_YET = "Not measured yet."

#: What an export was to be of a plain pass, at most: by what is trained, and projection. Lines of
#: export_ratio.csv from before have milder limits.
EXPORT_AIMS: Mapping[tuple[str, str], float] = {
    ("lora", "sjlt"): 0.78,
    ("lora", "rademacher"): 0.88,
    ("full", "sjlt"): 2.0,
}

#: Methods of `projecting`, in the order of its columns.
PROJECTIONS = ("copy", "sjlt", "rademacher", "gaussian", "stored matrix", "trak",
               "rademacher, int8")  # fmt: skip

#: What bergson keeps of a gradient, whatever d the other methods have beside it.
PEERS_SIDE = "16 x 16 a module"

Line = dict[str, str]


# ---- seeds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A strategy minus its reference, seed by seed: mean, half of the 95% interval, p-value."""

    mean: float
    half: float
    p: float


def difference(ours: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compare by a paired t test; both (n,), in the order of the seeds."""
    from scipy import stats

    each = [a - b for a, b in zip(ours, reference, strict=True)]
    spread_of = statistics.stdev(each)
    error = spread_of / len(each) ** 0.5
    mean, freedom = statistics.mean(each), len(each) - 1
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    # Without a spread but for rounding, such as of a share of few rows that is the same in every
    # seed, a t test knows nothing of what another seed would show: never marked.
    flat = spread_of <= FLAT * max(map(abs, (*ours, *reference)))
    return Difference(
        mean, half, 1.0 if flat else 2 * float(stats.t.sf(abs(mean) / error, freedom))
    )


def carried(p_values: Sequence[float]) -> list[bool]:
    """Say which of several p-values are below 5% after Holm's correction."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, holds = [False] * len(p_values), True
    for rank, i in enumerate(order):
        holds = holds and p_values[i] <= LEVEL / (len(p_values) - rank)
        found[i] = holds
    return found


def newest(lines: Iterable[Line], *keys: str) -> dict[tuple[str, ...], Line]:
    """Keep the last line of each combination of keys."""
    return {tuple(line[key] for key in keys): line for line in lines}


def one_machine(lines: Sequence[Line]) -> list[Line]:
    """Keep the lines of the newest processor, and of each GPU's: a table does not mix them."""
    last = {line["chip"]: line["cpu"] for line in lines}
    return [line for line in lines if line["cpu"] == last[line["chip"]]]


# ---- words of tables ---------------------------------------------------------------------------


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))


def bold(text: str, *, when: bool) -> str:
    """Mark a figure."""
    return f"**{text}**" if when else text


def where(lines: Iterable[Line]) -> str:
    """Name the machines, threads and load that lines were measured with."""
    found: dict[tuple[str, ...], list[float]] = {}
    for line in lines:
        chip = line.get("chip") or line["cpu"]
        key = (chip, line["cores"], line["threads"], line["torch"].partition("+")[0], line["date"])
        loads = found.setdefault(key, [])
        if line.get("load"):
            loads.append(float(line["load"]))
    return "; ".join(
        f"{cpu}, {cores} cores, {threads} thread{'s' if threads != '1' else ''}, torch {torch}, "
        + (f"load {spread(loads, 1)}, " if loads else "load not recorded, ")
        + date
        for (cpu, cores, threads, torch, date), loads in found.items()
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Write the smallest and the largest value, once if they are equal."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def plus_minus(found: Difference) -> str:
    """Write a difference with its interval."""
    low, high = found.mean - found.half, found.mean + found.half
    return f"{found.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def with_interval(values: Sequence[float], digits: int = 3) -> str:
    """Write the mean over seeds with its 95% interval by the t distribution, of two or more."""
    from scipy import stats

    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    half = float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * error
    return f"{mean:.{digits}f} ({mean - half:.{digits}f} to {mean + half:.{digits}f})"


def ratio(line: Line, key: str = "ratio") -> str:
    """Write a ratio with its smallest and largest pair."""
    low, high = line[f"{key}_min"], line[f"{key}_max"]
    between = f" ({float(low):.2f} to {float(high):.2f})" if low and high else ""
    return f"{float(line[key]):.2f}{between}"


def beside(line: Line, ours: str, other: str, digits: int) -> str:
    """Write two figures of a line, ours / the other."""
    if not line.get(ours) or not line.get(other):
        return UNKNOWN
    return f"{float(line[ours]):.{digits}f} / {float(line[other]):.{digits}f}"


# ---- strategies --------------------------------------------------------------------------------

#: Strategies that do not choose rows are compared with plain training.
PLAIN = "static"


def strategies(name: str, reference: str, figure: str) -> str:
    """Compare every strategy of one table of strategies.csv with its reference, by seed."""
    lines = newest((li for li in read(RESULTS / "strategies.csv") if li["table"] == name),
                   "strategy", "seed")  # fmt: skip
    seeds = {s: sorted(seed for t, seed in lines if t == s) for s, _ in lines}

    def values(strategy: str, column: str, of: str) -> list[float]:
        return [float(lines[strategy, seed][column]) for seed in seeds[of]]

    def against(strategy: str) -> str:
        return PLAIN if strategy.startswith("weight: ") and PLAIN in seeds else reference

    others = sorted((s for s in seeds if s != reference),
                    key=lambda s: statistics.mean(values(s, figure, s)))  # fmt: skip
    columns = ("target_loss", "mean_loss")
    found = {
        (s, c): difference(values(s, c, s), values(against(s), c, s))
        for s in others
        for c in columns
    }
    marked = dict(zip(found, carried([d.p for d in found.values()]), strict=True))
    ranked = sorted(seeds, key=lambda s: statistics.mean(values(s, figure, s)))
    body = []
    for strategy in ranked:
        cells = [f"`{strategy}`" + (f" against `{PLAIN}`" if against(strategy) == PLAIN else "")]
        for column in columns:
            mean = f"{statistics.mean(values(strategy, column, strategy)):.3f}"
            if strategy == reference:
                cells += [mean, ""]
                continue
            key = strategy, column
            cells += [mean, bold(plus_minus(found[key]), when=marked[key])]
        cells += [
            str(len(seeds[strategy])),
            cpu_seconds([lines[strategy, s] for s in seeds[strategy]]),
        ]
        body.append(cells)
    head = ("", "target's skill", f"minus `{reference}` (95%)", "all skills",
            f"minus `{reference}` (95%)", "seeds", "CPU s")  # fmt: skip
    return table(head, body) + "\n\n" + where(lines.values()) + "."


def cpu_seconds(lines: Sequence[Line]) -> str:
    """Write the median of a run's processor seconds, of the seeds that recorded them."""
    times = [float(line["cpu_s"]) for line in lines if line.get("cpu_s")]
    return f"{statistics.median(times):.0f}" if times else UNKNOWN


# ---- the others --------------------------------------------------------------------------------


def export() -> str:
    """Cost of a selection's export."""
    measured = [{**li, "trained": (li.get("finetuning") or "lora") + (li.get("modules") or "")}
                for li in read(RESULTS / "export_ratio.csv")
                if not li.get("chip") and not li.get("shape")]  # fmt: skip
    lines = newest(measured, "trained", "projection").values()
    of = {"fulllinear": ", whole linear layers", "fullall": ", all weights"}
    body = [
        (f"{line['projection']}, d = {line['d']}{of.get(line['trained'], '')}",
         f"{line['rows']}, {int(line['tokens']):,}",
         ratio(line), f"{EXPORT_AIMS[line['finetuning'] or 'lora', line['projection']]:.2f}",
         line["pairs"], beside(line, "export_s", "plain_s", 1),
         beside(line, "export_cpu_s", "plain_cpu_s", 1))
        for line in lines
    ]  # fmt: skip
    head = ("projection", "rows, tokens", "export / plain, median (pairs)", "aimed at, at most",
            "pairs", "wall s", "CPU s")  # fmt: skip
    return f"{table(head, body)}\n\n{where(lines)}."


def shares() -> str:
    """Share of the target's skill among the best rows, by feature."""
    lines = [li for li in read(RESULTS / "target_share.csv") if li["seed"] != "mean"]
    found = newest(lines, "method", "step", "seed")
    methods = dict.fromkeys(method for method, _, _ in found)
    steps = sorted({int(step) for _, step, _ in found})
    body = []
    for method in methods:
        cells = [method]
        for step in map(str, steps):
            each = [
                float(li["share"]) for (m, s, _), li in found.items() if (m, s) == (method, step)
            ]
            cells.append(f"{statistics.mean(each):.3f} ({spread(each, 3)})")
        body.append([*cells, str(len(each))])
    head = ("feature", *(f"after {step} steps (seeds)" for step in steps), "seeds")
    return f"{table(head, body)}\n\n{where(found.values())}."


def noise() -> str:
    """Error that a projection adds to a cosine."""
    lines = newest(read(RESULTS / "projection_noise.csv"), "step", "projection", "stored").values()
    body = [
        (line["projection"], line["step"], line["stored"], f"{float(line['std_over_theory']):.3f}",
         f"{float(line['worst_seed']):.3f}", f"{float(line['top5_overlap']):.1%}", line["pairs"],
         line["seeds"])
        for line in lines
    ]  # fmt: skip
    head = ("projection", "step", "stored", "std over (1 - ρ²)/√d", "worst seed",
            "top 5% in common with exact", "pairs", "seeds")  # fmt: skip
    return f"{table(head, body)}\n\n{where(lines)}."


def passes() -> str:
    """Cost of asking for losses, and of weights."""
    asked = newest(read(RESULTS / "loss_pass.csv"), "workload").values()
    weighted = newest(read(RESULTS / "weighting_cost.csv"), "workload", "accumulation").values()
    body = [
        (f"pass of the `loss` selector over a plain evaluation pass ({line['workload']})",
         ratio(line), line["pairs"], beside(line, "losses_cpu_s", "plain_cpu_s", 2))
        for line in asked
    ] + [
        (f"step of the `loss` weighter over a plain one, accumulation {line['accumulation']} "
         f"({line['workload']})", ratio(line), line["pairs"] or UNKNOWN,
         beside(line, "weighted_cpu_s", "plain_cpu_s", 3))
        for line in weighted
    ]  # fmt: skip
    head = ("", "ratio, median (pairs)", "pairs", "CPU s")
    return f"{table(head, body)}\n\n{where([*asked, *weighted])}."


def scoring(path: Path = RESULTS / "scoring.csv") -> str:
    """Speed and memory of scoring a stored generation beside torch and FAISS, by rows."""
    found = newest(one_machine(read(path)), "chip", "rows", "state", "beside")
    states = {"disk": "from disk", "opened": "in memory, just opened",
              "checked": "in memory, checked"}  # fmt: skip
    body = []
    for (chip, rows, state, other), line in found.items():
        if other != "torch":
            continue
        search = found.get((chip, rows, state, "faiss"), {})
        peaks = (line["ours_peak_mib"], line["beside_peak_mib"], search.get("beside_peak_mib"))
        memory = " / ".join(f"{float(peak):,.0f}" if peak else "-" for peak in peaks)
        body.append((
            f"{int(rows):,} x {int(line['dim']):,}", chip or "CPU", states[state],
            f"{float(line['ours_gb_s']):.2f}", f"{ratio(line)}, {line['way']}",
            ratio(search) if search else "", line["pairs"] or UNKNOWN, memory,
        ))  # fmt: skip
    head = ("float16 rows", "device", "state", "GB/s", "speed / plain torch's, its faster way",
            "speed / FAISS's search", "rounds", "peak MiB: ours / torch / FAISS")  # fmt: skip
    built = "; ".join(
        f"{int(line['rows']):,} rows {float(line['build_s']):.1f} s, `{line['way']}`"
        for line in found.values() if line["build_s"]
    )  # fmt: skip
    before = f"FAISS's index was built before: {built}. " if built else ""
    return f"{table(head, body)}\n\n{before}{where(found.values())}."


def throughput() -> str:
    """Speed of writing and reading a store beside a bare memory map; of two workers beside one."""
    every = [{**line, "what": f"write, {line.get('behind') or 4} at once"}
             if line["what"] == "write" else line
             for line in read(RESULTS / "throughput.csv")]  # fmt: skip
    lines = newest(every, "what", "rows", "cache").values()
    body = [
        (line["what"], line["cache"], beside(line, "store_s", "map_s", 3),
         beside(line, "store_cpu_s", "map_cpu_s", 3), ratio(line), line["pairs"])
        for line in lines if line["what"] != "memory"
    ]  # fmt: skip
    head = ("50,000 x 4,096 float16", "page cache", "store / map, s", "CPU s",
            "speed / map, median (pairs)", "pairs")  # fmt: skip
    grown = "; ".join(
        f"{int(line['rows']):,}: {float(line['peak_mib']):.0f}"
        for line in lines if line["what"] == "memory"
    )  # fmt: skip
    memory = f"Peak memory of a build above its imports, MiB by rows: {grown}."
    pair = list(newest(read(RESULTS / "workers.csv"), "units", "dim").values())[-1]
    workers = (
        f"Two workers beside one, {pair['units']} units of {float(pair['hashed_mb']):.0f} MB to "
        f"hash: {ratio(pair)} times as fast, {pair['pairs']} pairs ({where([pair])})."
    )
    return f"{table(head, body)}\n\n{memory} {where(lines)}.\n\n{workers}"


def scale_runs(path: Path) -> list[dict[str, Line]]:
    """Split the lines of scale.csv into its runs, each by what it measured; a build begins one."""
    runs: list[dict[str, Line]] = []
    for line in read(path):
        if line["what"] == "build":
            runs.append({})
        runs[-1][line["what"]] = line
    most = max(int(run["build"]["rows"]) for run in runs)
    return [run for run in runs if int(run["build"]["rows"]) == most]


def shown_run(runs: Sequence[dict[str, Line]]) -> dict[str, Line]:
    """Choose the run that a table shows: of those with the last one's units, that of most pairs."""
    units = runs[-1]["build"]["unit_rows"]
    alike = [run for run in runs if run["build"]["unit_rows"] == units]
    return max(reversed(alike), key=lambda run: int(run["cold"]["pairs"]))


def scale(path: Path = RESULTS / "scale.csv") -> str:
    """Ten million rows as measured, and what a thousand million would take by the same rates."""
    runs = scale_runs(path)
    of = shown_run(runs)
    rows, unit_rows = (int(of["build"][key]) for key in ("rows", "unit_rows"))
    times = FAR_ROWS * FAR_CHECKPOINTS / rows
    per_row, again = float(of["bytes a row"]["row_bytes"]), of.get("rerank")
    body = [
        ("bytes", f"{per_row * rows / 1e9:.1f} GB", f"{per_row * rows * times / 1e12:.1f} TB", "")
    ]
    if again is not None:
        fewer, others = int(again["rows"]), float(again["row_bytes"])
        body.append((f"bytes of a second store, int8, {fewer:,} rows",
                     f"{others * fewer / 1e9:.1f} GB",
                     f"{others * FAR_ROWS * FAR_CHECKPOINTS / 1e12:.1f} TB", ""))  # fmt: skip
    in_all = 0.0
    for name, seconds, measured_rows, cores in scale_parts(of):
        hours = seconds * FAR_ROWS * FAR_CHECKPOINTS / measured_rows * cores / 3600
        body.append((name, f"{seconds:.1f} s", f"{hours:.1f} core-hours", f"{hours * PRICE:.2f}"))
        in_all += hours if name != SCANNED_AGAIN else 0
    nodes = math.ceil(in_all / (NODE_CORES * NODE_HOURS))
    need = (
        f"{nodes} node{'s' if nodes > 1 else ''}, done in {in_all / nodes / NODE_CORES:.1f} hours, "
        f"{per_row * rows * times / nodes / 1e12:.1f} TB a node"
    )
    body += [
        ("all of it, scanned once", "", f"{in_all:.1f} core-hours", f"{in_all * PRICE:.2f}"),
        (f"nodes of {NODE_CORES} cores that need at most {NODE_HOURS} hours", "", need, ""),
    ]
    head = (f"{rows:,} x 4,096, 1 bit, units of {unit_rows:,}", "measured",
            f"{FAR_ROWS:.0e} rows x {FAR_CHECKPOINTS} checkpoints, calculated", "USD")  # fmt: skip
    speeds = "; ".join(
        f"{name} {ratio(of[what])} (reading {float(of[what]['read_s']):.1f} s)"
        for what, name in (("cold", "from disk"), ("first", "from memory, unchecked"),
                           ("again", "from memory, checked"))
    )  # fmt: skip
    return (
        f"{table(head, body)}\n\nSpeed of a scan over that of reading the same files, "
        f"{of['cold']['pairs']} pairs: {speeds}. Peak memory of the build: "
        f"{int(of['build']['peak_mib']):,} MiB. {where(of.values())}.\n\n{from_disk(runs)}"
    )


def scale_parts(of: Mapping[str, Line]) -> list[tuple[str, float, int, int]]:
    """List a run's works: name, seconds, rows that they are of, cores that they keep busy."""
    rows, cores = int(of["build"]["rows"]), int(of["cold"]["threads"])
    parts = [
        ("rotate and pack, one core", float(of["encode"]["scan_s"]) * rows / 1e6, rows, 1),
        ("write and commit, one process", float(of["build"]["scan_s"]), rows, 1),
        ("scan, nothing in memory yet", float(of["cold"]["scan_s"]), rows, cores),
        (SCANNED_AGAIN, float(of["again"]["scan_s"]), rows, cores),
        ("choice of the best 5%", float(of["choice"]["scan_s"]), rows, 1),
    ]
    if "rerank" in of:
        fewer = int(of["rerank"]["rows"])
        name = f"re-rank of the best 7.5% by it, {fewer:,} rows"
        parts.append((name, float(of["rerank"]["scan_s"]), fewer, cores))
    return parts


def from_disk(runs: Sequence[dict[str, Line]]) -> str:
    """Tell every run's scan from disk, by processor, and how many miss what was aimed at."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        cold = run["cold"]
        plural = "s" if cold["threads"] != "1" else ""
        key = cold["cpu"], f"{int(cold['unit_rows']):,}"
        found.setdefault(key, []).append(
            f"{ratio(cold)} with {cold['threads']} thread{plural}, {cold['pairs']} pairs"
        )
    told = "; ".join(
        f"{cpu}, units of {units}: {', '.join(each)}" for (cpu, units), each in found.items()
    )
    missed = sum(float(run["cold"]["ratio"]) < SCALE_LIMIT for run in runs)
    return f"From disk in all {len(runs)} runs, {missed} of them below {SCALE_LIMIT}: {told}."


def tsds() -> str:
    """Cost of a selection by TSDS."""
    lines = newest(read(RESULTS / "tsds_cost.csv"), "parameters", "rows").values()
    body = [
        (line["parameters"], f"{int(line['rows']):,}", f"{float(line['cpu_s']):.2f}",
         f"{float(line['seconds']):.2f} ({float(line['seconds_min']):.2f} to "
         f"{float(line['seconds_max']):.2f})")
        for line in lines
    ]  # fmt: skip
    head = ("parameters", "rows", "CPU s, median of 3", "wall s (spread)")
    return f"{table(head, body)}\n\n{where(lines)}."


def subsets() -> str:
    """Cost of each subset rule at a million rows."""
    lines = newest(read(RESULTS / "subset_cost.csv"), "rule", "rows").values()
    body = [
        (f"`{line['rule']}`" if line["rule"] != "none" else "the similarities alone",
         f"{int(line['rows']):,} x {line['targets']}", f"{int(line['k']):,}", line["seconds"],
         line["cpu_s"], f"{line['peak_mib']} MiB")
        for line in lines
    ]  # fmt: skip
    head = ("rule", "train x target rows", "k", "wall s", "CPU s", "peak above the interpreter")
    return f"{table(head, body)}\n\n{where(lines)}."


def services() -> str:
    """Target rows that each subset rule serves, where the target is of eight kinds."""
    found = newest(read(RESULTS / "subset_service.csv"), "rule", "step", "seed")
    body = []
    for rule in dict.fromkeys(rule for rule, _, _ in found):
        cells = [f"`{rule.partition(', ')[0]}`" + rule[len(rule.partition(", ")[0]) :]]
        for step in dict.fromkeys(step for _, step, _ in found):
            of = [line for (r, s, _), line in found.items() if (r, s) == (rule, step)]
            cells += [f"{statistics.mean(float(line['skills']) for line in of):.2f}",
                      f"{statistics.mean(float(line['fewest']) for line in of):.1f}",
                      f"{statistics.mean(float(line['noise']) for line in of):.1f}"]  # fmt: skip
        body.append(cells)
    head = ["rule"]
    for step in dict.fromkeys(step for _, step, _ in found):
        head += [f"after {step} steps: skills as if evenly served, of 8", "rows of the fewest",
                 "rows of noise"]  # fmt: skip
    seeds = len({seed for *_, seed in found})
    return f"{table(head, body)}\n\nMeans over {seeds} seeds; {where(found.values())}."


def lengths() -> str:
    """Correlation of scores with the rows' lengths, and what correcting it does."""
    found = newest(read(RESULTS / "length_bias.csv"), "product", "step", "correction", "seed")
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for (product, step, correction, _), line in found.items():
        if product != "gradient norm" or correction == "none":
            groups.setdefault((product, step, correction), []).append(line)
    body = []
    for (product, step, correction), of in groups.items():
        means = {key: statistics.mean(float(line[key]) for line in of)
                 for key in ("all", "within", "share", "tokens")}  # fmt: skip
        best = (f"{means['share']:.3f}", f"{means['tokens']:.2f}")
        body.append((product, step, correction, f"{means['all']:+.2f}", f"{means['within']:+.2f}",
                     *(("", "") if product == "gradient norm" else best)))  # fmt: skip
    seeds = len({seed for *_, seed in found})
    head = ("product", "step", "correction", "Spearman with tokens", "within a skill",
            "target's skill in the best 5%", "their tokens over the skill's")  # fmt: skip
    return f"{table(head, body)}\n\nMeans over {seeds} seeds; {where(found.values())}."


def audits() -> str:
    """Wrong answers found by each signal of an audit, against the loss."""
    lines = newest(read(RESULTS / "audit.csv"), "setting", "signal", "seed").values()
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((line["setting"], line["signal"]), []).append(line)
    areas = {key: [float(line["auroc"]) for line in of] for key, of in found.items()}
    compared = {key: difference(areas[key], areas[key[0], "loss"])
                for key in areas if key[1] != "loss"}  # fmt: skip
    marks = dict(zip(compared, carried([each.p for each in compared.values()]), strict=True))
    settings = list(dict.fromkeys(setting for setting, _ in found))
    body = []
    for key in sorted(areas, key=lambda k: (settings.index(k[0]), -statistics.mean(areas[k]))):
        shares = [float(line["precision"]) for line in found[key]]
        both = (f"{statistics.mean(of):.3f} ({spread(of, 3)})" for of in (areas[key], shares))
        ahead = bold(plus_minus(compared[key]), when=marks[key]) if key in compared else ""
        body.append((*key, *both, ahead, str(len(shares))))
    head = ("checkpoints", "signal", "AUROC (seeds)", "precision (seeds)",
            "AUROC beside loss (95%)", "seeds")  # fmt: skip
    return f"{table(head, body)}\n\n{where(lines)}."


def looking() -> str:
    """Time from a question to its answer, by command, by page and by API."""
    served = list(newest(read(RESULTS / "serve.csv"), "rows", "dim").values())[-1]
    asked = list(newest(read(RESULTS / "explain.csv"), "cpu").values())[-1]
    page = list(newest(read(RESULTS / "report_page.csv"), "rows").values())[-1]
    size = f"{int(served['rows']):,} x {int(served['dim']):,}"
    body = [
        (f"`POST /v1/query` over {size}, above the scan itself", f"{served['above_p50_ms']} ms",
         f"scan {served['scan_p50_ms']} ms; medians of {served['repeats']}"),
        (f"{served['client_queries']} queries by {served['clients']} clients at once",
         f"{served['client_queries_s']} s", f"{served['errors']} errors; the server grew from "
         f"{served['memory_before_mib']} to {served['memory_after_mib']} MiB"),
        (f"first paint of a table of {int(served['table_rows']):,} rows with text",
         f"{served['first_paint_ms']} ms", "request to first row, scores scanned"),
        ("`gradstore explain`, the whole command", f"{asked['cold_s']} s",
         f"median of {asked['colds']}, slowest {asked['cold_s_max']} s"),
        ("`Explainer.explain`, model loaded", f"{asked['warm_s']} s",
         f"median of {asked['warms']}, slowest {asked['warm_s_max']} s"),
        (f"report.html of {page['updates']} updates, {int(page['chosen']):,} of "
         f"{int(page['rows']):,} rows each", f"{page['seconds']} s", f"{page['kb']} kB"),
    ]  # fmt: skip
    return f"{table(('', 'took', ''), body)}\n\n{where([served, asked, page])}."


def stress() -> str:
    """Workers killed at random, by who started them and where their stores were."""
    lines = read(RESULTS / "stress.csv")
    found: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        counts = found.setdefault((line["launcher"], line["place"]), [0, 0, 0])
        for at, key in enumerate(("kills", "stores", "seconds")):
            counts[at] += int(line[key])
    rows = [*found.items(), (("all", ""), [sum(c[at] for c in found.values()) for at in range(3)])]
    body = [(*who, *(f"{count:,}" for count in counts)) for who, counts in rows]
    head = ("workers", "stores in a", "killed", "stores", "seconds")
    return f"{table(head, body)}\n\n{', '.join(sorted({line['date'] for line in lines}))}."


def service_writes() -> str:
    """Files that a server takes, by their size and by clients at once."""
    lines = list(newest(read(RESULTS / "serve_writes.csv"), "array", "clients").values())
    body = [
        (f"{int(line['bytes']):,} bytes (`{line['array']}`)", line["clients"], line["requests_s"],
         line["mb_s"], f"{float(line['p50_ms']):.0f} / {float(line['p99_ms']):.0f} ms",
         f"{line['on_disk_p50_ms']} ms", f"{line['failures']} of {int(line['requests']):,}",
         f"{line['memory_before_mib']} to {line['memory_peak_mib']} MiB")
        for line in lines
    ]  # fmt: skip
    head = ("file", "clients", "files/s", "MB/s", "p50 / p99", "on disk, without a server",
            "failed", "server's memory")  # fmt: skip
    return f"{table(head, body)}\n\n{where(lines)}."


#: Seeds from which on a difference is told.
LEAST_SEEDS = 3

#: What a line of rules.csv is compared with.
RULES_DEFAULT = "less"


#: Of each method, a figure by seed.
BySeed = dict[str, dict[str, float]]


def _by_seed(lines: Iterable[Line], figure: str) -> BySeed:
    """Gather a figure by method and seed, from the lines that have it."""
    found: BySeed = {}
    for line in lines:
        if line[figure]:
            found.setdefault(line["method"], {})[line["seed"]] = float(line[figure])
    return found


def _seed_table(
    columns: Mapping[str, BySeed], order: str, extra: Mapping[str, Mapping[str, str]]
) -> str:
    """Write means over seeds, and each method's difference to `less` over the seeds that it has.

    Args:
        columns: figures by the column's head; of fewer than `LEAST_SEEDS` no difference is told.
        order: head of the column by which methods are ordered, lowest first.
        extra: cells of further columns, by head and method.
    """
    gaps = {
        (method, head): difference([*values.values()], [found[RULES_DEFAULT][s] for s in values])
        for head, found in columns.items() for method, values in found.items()
        if method != RULES_DEFAULT and len(values) >= LEAST_SEEDS
        and values.keys() <= found[RULES_DEFAULT].keys()
    }  # fmt: skip
    marks = dict(zip(gaps, carried([gap.p for gap in gaps.values()]), strict=True))
    body = []
    for method, seeds in sorted(
        columns[order].items(), key=lambda item: statistics.mean(item[1].values())
    ):
        cells = [f"`{method}`"]
        for head, found in columns.items():
            key = method, head
            gap = bold(plus_minus(gaps[key]), when=marks[key]) if key in gaps else ""
            mean = f"{statistics.mean(found[method].values()):.3f}" if method in found else ""
            cells.append(f"{mean} {gap}".strip())
        counts = {head: len(found[method]) for head, found in columns.items() if method in found}
        body.append([*cells, *(cell[method] for cell in extra.values()),
                     told_seeds(len(seeds), counts)])  # fmt: skip
    return table(("", *columns, *extra, "seeds"), body)


def told_seeds(seeds: int, counts: Mapping[str, int]) -> str:
    """Write how many seeds a line has, and which of its columns have another number of them.

    Args:
        seeds: of the line.
        counts: by a column's head, of which what stands behind the last comma is told.

    Examples:
        >>> told_seeds(8, {"loss": 8, "share, clipped": 3, "loss, clipped": 3})
        '8 (3 clipped)'
    """
    others = {f"{count} {head.rpartition(', ')[2]}": None
              for head, count in counts.items() if count != seeds}  # fmt: skip
    return f"{seeds} ({', '.join(others)})" if others else str(seeds)


def rules(path: Path = RESULTS / "rules.csv") -> str:
    """Share of the right rule, and held-out loss after training on the chosen rows."""
    known = newest(read(path), "method", "step", "seed", "clip").values()
    every = [line for line in known if not line["method"].endswith(OVER_ALL)]
    plain = [line for line in every if not line["clip"]]
    clipped = [line for line in every if line["clip"]]
    steps = sorted({line["step"] for line in plain}, key=int)
    last = [line for line in plain if line["step"] == steps[-1]]
    columns = {f"share after {step} steps": _by_seed(
        (line for line in plain if line["step"] == step), "share") for step in steps}  # fmt: skip
    columns["held-out loss"] = _by_seed(last, "loss")
    if clipped:
        columns["share, clipped"] = _by_seed(clipped, "share")
        columns["loss, clipped"] = _by_seed(clipped, "loss")
    seconds = {method: f"{statistics.median(each.values()):.1f}"
               for method, each in _by_seed(last, "cpu_s").items()}  # fmt: skip
    shown = _seed_table(columns, "held-out loss", {"CPU s": seconds})
    return f"{shown}\n\n{where(every)}."


#: Begins the columns of rules.csv that have one rule's share.
OF_RULE = "share of "


def rules_each(path: Path = RESULTS / "rules.csv") -> str:
    """Share of the right rule by rule, at the last step, of methods whose lines have it."""
    lines = [line for line in read(path) if not line["clip"]]
    known = [
        line for line in lines if any(line.get(key) for key in line if key.startswith(OF_RULE))
    ]
    if not known:
        return NOT_YET
    last = max((line["step"] for line in known), key=int)
    found = list(
        newest((line for line in known if line["step"] == last), "method", "seed").values()
    )
    keys = [key for key in found[0] if key.startswith(OF_RULE)]
    body = []
    for method in dict.fromkeys(line["method"] for line in found):
        of = [line for line in found if line["method"] == method]
        cells = (with_interval([float(line[key]) for line in of], 2) for key in keys)
        body.append((f"`{method}`", *cells, str(len(of))))
    head = (f"after {last} steps", *(f"{key.removeprefix(OF_RULE)} (95%)" for key in keys), "seeds")
    return f"{table(head, body)}\n\n{where(found)}."


#: Ends the name of a method that takes earlier checkpoints too; its table is one of its own.
OVER_ALL = ", checkpoints: all"


def over_checkpoints(path: Path = RESULTS / "rules.csv") -> str:
    """Methods over earlier checkpoints, beside themselves at the last one alone."""
    plain = [line for line in read(path) if not line["clip"]]
    last = max((line["step"] for line in plain), key=int)
    lines = newest((line for line in plain if line["step"] == last), "method", "seed")
    taken = [line for (method, _), line in lines.items() if method.endswith(OVER_ALL)]
    body, paired = [], list[tuple[Line, Line]]()
    for method in dict.fromkeys(line["method"] for line in taken):
        alone = method.removesuffix(OVER_ALL)
        seeds = [seed for name, seed in lines if name == method]
        cells = []
        for figure in ("share", "loss"):
            ours, beside_it = (
                [float(lines[name, seed][figure]) for seed in seeds] for name in (method, alone)
            )
            gap = plus_minus(difference(ours, beside_it))
            cells += [f"{statistics.mean(beside_it):.3f}", f"{statistics.mean(ours):.3f} {gap}"]
        price = statistics.median(float(lines[method, seed]["cpu_s"]) for seed in seeds)
        body.append((f"`{alone}`", *cells, f"{price:.1f}", str(len(seeds))))
        paired += [(lines[method, seed], lines[alone, seed]) for seed in seeds]
    head = ("", "share, last checkpoint", "all", "held-out loss, last checkpoint", "all",
            "CPU s, all", "seeds")  # fmt: skip
    apart = sum(ours["cpu"] != beside_it["cpu"] for ours, beside_it in paired)
    told = f"Of {len(paired)} pairs {apart} are of two processors."
    beside_them = where(beside_it for _, beside_it in paired)
    return f"{table(head, body)}\n\n{told} All: {where(taken)}. Last: {beside_them}."


#: Methods of rules.csv that the README shows, and what lds.csv calls their scores.
SHOWN = {
    "oracle": "",
    "less, sgd, fisher, round_robin": "",
    "less, round_robin": "",
    "less, sgd, fisher": "sgd, fisher, cosine",
    "mirror": "",
    "less": "adam_marginal, cosine (default)",
    "rds_plus": "rds_plus",
    "near (hidden states)": "near (hidden states)",
    "random": "random",
    "bm25": "bm25",
}


def quality() -> str:
    """Show the ten lines of the quality benchmarks that matter."""
    shown = [line for line in read(RESULTS / "rules.csv")
             if line["method"] in SHOWN and not line["clip"]]  # fmt: skip
    lines = newest(shown, "method", "step", "seed")
    trust = {line["score"]: line for line in _measured_lds(RESULTS / "lds.csv")
             if line["figure"] == "lds" and not line["run"] and _as_in_file(line)}  # fmt: skip
    last = max((step for _, step, _ in lines), key=int)
    here = [line for line in lines.values() if line["step"] == last]
    share, loss, seconds = (_by_seed(here, figure) for figure in ("share", "loss", "cpu_s"))
    means = {method: statistics.mean(loss[method].values()) for method in SHOWN}
    body = []
    for method in sorted(SHOWN, key=lambda method: means[method]):
        score, price = SHOWN[method], statistics.median(seconds[method].values())
        body.append((f"`{method}`", with_interval([*share[method].values()], 2),
                     with_interval([*loss[method].values()]),
                     _of_queries(trust[score], digits=2) if score else "",
                     f"{price:.1f}"))  # fmt: skip
    head = ("rows chosen by", "of the target's rule (95%)", "held-out loss (95%)", "LDS (95%)",
            "CPU s")  # fmt: skip
    seeds = {seed for _, _, seed in lines}
    told = _of_what(trust[score] for score in SHOWN.values() if score)
    return f"{table(head, body)}\n\n{len(seeds)} seeds; LDS: {told} {where(lines.values())}."


#: States of effect.csv whose scores are all shown; of the others, some of them.
EFFECT_STATES = ("12", "36", "106, learnt rows", "36, clipped")
EFFECT_SCORES = ("adam_marginal, cosine", "adam_marginal, dot", "adam_share, cosine",
                 "adam_share, dot", "sgd, cosine")  # fmt: skip


def _effects() -> dict[tuple[str, str, str], list[Line]]:
    """Gather the newest lines of effect.csv by score, state and effect: one for each seed."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    lines = newest(read(RESULTS / "effect.csv"), "score", "state", "effect", "seed")
    for (score, state, effect, _), line in lines.items():
        found.setdefault((score, state, effect), []).append(line)
    return found


def _mean(lines: Sequence[Line], figure: str = "spearman") -> float:
    return statistics.mean(float(line[figure]) for line in lines)


def _with_rows(lines: Sequence[Line]) -> str:
    """Write the seeds' mean, and the lowest and highest end of their 95% intervals over rows."""
    low, high = (choose(float(line[end]) for line in lines)
                 for choose, end in ((min, "low"), (max, "high")))  # fmt: skip
    return f"{_mean(lines):.3f} ({low:.2f} to {high:.2f})"


#: What stands in brackets in the tables of effect.csv.
OVER_ROWS = "In brackets the lowest and highest end of the seeds' 95% intervals over the rows."


def effects() -> str:
    """Rank correlation of scores with the effect of real steps."""
    found = _effects()
    body, shown = [], []
    for score in dict.fromkeys(score for score, _, _ in found):
        here = [[found[score, state, effect] for effect in ("one", "batch")]
                for state in EFFECT_STATES]  # fmt: skip
        cells = [" / ".join(_with_rows(of) for of in pair) for pair in here]
        body.append((score, *cells, str(len(here[0][0]))))
        shown += [line for pair in here for of in pair for line in of]
    ceilings = [_mean(found[EFFECT_SCORES[0], state, "batch"], "ceiling")
                for state in EFFECT_STATES]  # fmt: skip
    body.append(("ceiling", *(f"1 / {each:.3f}" for each in ceilings), body[0][-1]))
    head = ("score", *(f"step {state}" for state in EFFECT_STATES), "seeds")
    return f"{table(head, body)}\n\n{OVER_ROWS} {where(shown)}."


def effects_elsewhere() -> str:
    """Compare scores with a row's part in a batch at other steps, rates, batches, clipping."""
    found = _effects()
    states = [state for state in dict.fromkeys(state for _, state, _ in found)
              if state not in EFFECT_STATES]  # fmt: skip
    body, shown = [], []
    for state in states:
        here = [found[score, state, "batch"] for score in EFFECT_SCORES]
        facts = (f"{_mean(here[0], 'clip'):.2f}", f"{_mean(here[0], 'crossed'):.2f}")
        body.append((state, *facts, *(_with_rows(of) for of in here), str(len(here[0]))))
        shown += [line for of in here for line in of]
    head = ("step", "clip factor", "crossed", *EFFECT_SCORES, "seeds")
    return f"{table(head, body)}\n\n{OVER_ROWS} {where(shown)}."


def wrong_rows() -> str:
    """Wrong answers, and rows of the right rule, among the best rows of every score."""
    lines = newest(read(RESULTS / "wrong_rows.csv"), "score", "step", "seed")
    steps = sorted({step for _, step, _ in lines}, key=int)
    columns = [(figure, step) for figure in ("wrong", "share") for step in steps]
    body = []
    for score in dict.fromkeys(score for score, _, _ in lines):
        found = [[float(line[figure]) for key, line in lines.items() if key[:2] == (score, step)]
                 for figure, step in columns]  # fmt: skip
        cells = [f"{statistics.mean(of):.3f} ({spread(of, 2)})" for of in found]
        body.append((f"`{score}`", *cells, str(len(found[0]))))
    names = {"wrong": "wrong answers", "share": "right rule"}
    head = ("score", *(f"{names[figure]} after {step} steps" for figure, step in columns), "seeds")
    return f"{table(head, body)}\n\n{where(lines.values())}."


def _measured_lds(path: Path) -> list[Line]:
    """Read lds.csv; lines from before have the file's own state, halves, and no differences."""
    return [
        {"state": "", **line, "fraction": line.get("fraction") or HALVES} for line in read(path)
    ]


def _as_in_file(line: Line) -> bool:
    """Tell whether a line of lds.csv is of halves of the rows, in the file's own state."""
    return not line["state"] and line["fraction"] == HALVES


#: Fraction of the rows that a subset of LDS has where its line names none.
HALVES = "0.5"

#: Columns of lds.csv that hold paired differences, and their heads.
LDS_BESIDE = {"minus_default": "LDS minus the default's (95%)",
              "minus_exact": "LDS minus `rerank by exact`'s (95%)"}  # fmt: skip


def _of_queries(line: Line | None, prefix: str = "", sign: str = "", digits: int = 3) -> str:
    """Write a mean over queries with its interval; * for one over the queries alone."""
    low, mean, high = ((line or {}).get(prefix + key) for key in ("low", "mean", "high"))
    if not (line and low and mean and high):
        return ""
    star = "" if line.get("interval") else "\\*"
    found = [f"{float(value):{sign}.{digits}f}" for value in (mean, low, high)]
    return f"{found[0]} ({found[1]} to {found[2]}){star}"


def _of_what(lines: Iterable[Line]) -> str:
    """Say what the intervals of lines are over."""
    found = {line.get("interval", "") for line in lines}
    told = [f"Intervals are over {what}, each drawn anew." for what in sorted(found - {""})]
    if "" in found:
        told.append(
            "\\* over the 32 queries alone, as if each were of a skill of its own and the "
            "retrained models given: too narrow for what other models would show."
        )
    return " ".join(told)


def trusted(run: str = "", path: Path = RESULTS / "lds.csv") -> str:
    """LDS and QLD of every score, on the file's run or on the smooth one."""
    found = [line for line in _measured_lds(path) if line["run"] == run and _as_in_file(line)]
    lines = newest(found, "score", "figure")
    figures = list(dict.fromkeys(figure for _, figure in lines))
    beside = {key: head for key, head in LDS_BESIDE.items()
              if any(line.get(f"{key}_mean") for line in found)}  # fmt: skip
    scores = dict.fromkeys(score for score, _ in lines)
    body = []
    for score in sorted(scores, key=lambda name: -float(lines[name, "lds"]["mean"])):
        cells = [_of_queries(lines.get((score, figure))) for figure in figures]
        cells[1:1] = [_of_queries(lines[score, "lds"], f"{key}_", "+") for key in beside]
        body.append((score, *cells))
    names = {"lds": "LDS (95%)", "replay": "rank correlation with replay (95%)"}
    heads = [names.get(figure, f"{figure.upper()} (95%)") for figure in figures]
    heads[1:1] = beside.values()
    shown = table(("score", *heads), body)
    return f"{shown}\n\n{_of_what(lines.values())} {where(lines.values())}."


def trusted_elsewhere(path: Path = RESULTS / "lds.csv") -> str:
    """LDS and QLD from other states of training, and of other fractions of the rows."""
    found = [line for line in _measured_lds(path) if line["state"] or line["fraction"] != HALVES]
    if not found:
        return NOT_YET
    lines = newest(found, "score", "figure", "run", "state", "fraction")
    columns = list(dict.fromkeys(key[1:] for key in lines))
    scores = list(dict.fromkeys(key[0] for key in lines))
    body = []
    for suffix, prefix, sign in (("", "", ""), (", minus the default", "minus_default_", "+")):
        for score in scores:
            cells = [_of_queries(lines.get((score, *of)), prefix, sign) for of in columns]
            if any(cells):
                body.append((score + suffix, *cells))
    heads = []
    for figure, run, state, fraction in columns:
        of = f"{float(fraction):.0%} of the rows" if figure == "lds" else ""
        heads.append(", ".join(filter(None, (figure.upper(), run, state, of))) + " (95%)")
    counts = [float(line["subsets"]) for line in lines.values()]
    shown = table(("score", *heads), body)
    told = f"{spread(counts, 0)} subsets. {_of_what(lines.values())}"
    return f"{shown}\n\n{told} {where(lines.values())}."


def curvature() -> str:
    """Cost of the Fisher preconditioner."""
    lines = newest(read(RESULTS / "curvature.csv"), "rows", "dim").values()
    body = [
        (f"{int(line['rows']):,} x {int(line['dim']):,}", f"{float(line['fit_s']):.1f}",
         f"{int(line['fitted_on']):,}", f"{float(line['solve_s']):.2f}", ratio(line),
         line["pairs"], f"{float(line['peak_mib']):.0f} MiB")
        for line in lines
    ]  # fmt: skip
    head = ("float16 rows", "fit s", "rows fitted on", "solve s", "scan with / without, median "
            "(pairs)", "pairs", "peak")  # fmt: skip
    return f"{table(head, body)}\n\n{where(lines)}."


def dtypes() -> str:
    """Bytes, speed and found rows of each stored dtype."""
    every = newest(read(RESULTS / "dtypes.csv"), "dtype", "model")
    near = {dtype: line for (dtype, model), line in every.items() if not model}
    far = {dtype: line for (dtype, model), line in every.items() if model}

    def error(line: Line) -> str:
        both = [line.get(name, "") for name in ("error_std", "error_max")]
        return " / ".join(f"{float(value):.1e}" for value in both) if all(both) else ""

    def found(line: Line) -> tuple[str, ...]:
        return (f"{float(line['overlap']):.3f}", f"{float(line['reranked']):.3f}",
                f"{float(line['spearman']):.4f}", f"{float(line['skill']):.3f}")  # fmt: skip

    def all_told(line: Line) -> str:
        both = [line.get(name, "") for name in ("file_bytes", "disk_bytes")]
        return " / ".join(f"{float(value):,.0f}" for value in both) if all(both) else UNKNOWN

    body = [
        (f"`{dtype}`", f"{float(line['feature_bytes']):,.0f}",
         f"{float(line['row_bytes']):,.0f}", all_told(line), ratio(line),
         f"{int(line['read_rows_s']):,}",
         *found(line), error(line),
         *((*found(far[dtype])[:3], error(far[dtype])) if far else ()))
        for dtype, line in near.items()
    ]  # fmt: skip
    of_a_score = "error of a score: std / largest"
    smollm2 = ("SmolLM2: same best 5%", "re-ranked", "rank correlation", of_a_score)
    more = smollm2 if far else ()
    head = ("dtype", "bytes of features", "of all arrays", "of all files / of their blocks",
            "scan, rows/s over float16's, median (pairs)", "rows/s read", "same best 5%",
            "of its best 7.5%, re-ranked", "rank correlation", "target's skill in the best 5%",
            of_a_score, *more)  # fmt: skip
    return f"{table(head, body)}\n\n{where(every.values())}."


#: Part of the rows that a method of real.py takes, where its line names none.
REAL_PART = 0.1


def part_of(line: Line) -> float | None:
    """Return the part of the rows that a line of real.csv is of; None for planted rows."""
    return None if line["target"] == "planted" else float(line.get("part") or REAL_PART)


def real_parts(path: Path = RESULTS / "real.csv") -> str:
    """Compare selections of other parts of the real rows than a tenth."""
    parts = {part_of(line) for line in read(path)} - {REAL_PART, None}
    shown = [
        f"{part:.0%} of the rows:\n\n{real(path, part)}" for part in sorted(filter(None, parts))
    ]
    return "\n\n".join(shown) or NOT_YET


def real(path: Path = RESULTS / "real.csv", part: float = REAL_PART) -> str:
    """Compare selections on real rows: held-out loss, answers, and the price of choosing."""
    of_part = [line for line in read(path) if part_of(line) == part]
    chosen = list(newest(of_part, "method", "target", "seed").values())
    by_target = {
        target: [line for line in chosen if line["target"] == target]
        for target in dict.fromkeys(line["target"] for line in chosen)
    }
    losses = {f"{target}: loss": _by_seed(found, "loss") for target, found in by_target.items()}
    others: dict[str, dict[str, str]] = {}
    for figure in ("share", "exact", "score"):
        for target, found in by_target.items():
            values = _by_seed(found, figure)
            # Where no method gets an answer right, the column says nothing.
            if any(max(each.values()) > 0 for each in values.values()):
                others[f"{target}: {figure} (95%)"] = {
                    method: with_interval([*each.values()], 2) for method, each in values.items()
                }
    others["choosing / training, seconds"] = {
        method: f"{statistics.median(ratios.values()):.1f}"
        for method, ratios in _by_seed(
            [line | {"ratio": str(float(line["choose_s"]) / float(line["train_s"])),
                     "seed": f"{line['target']} {line['seed']}"} for line in chosen], "ratio"
        ).items()
    }  # fmt: skip
    return f"{_seed_table(losses, next(iter(losses)), others)}\n\n{where(chosen)}."


def planted(path: Path = RESULTS / "real.csv") -> str:
    """Compare scores by the planted poison and the planted facts that they find."""
    lines = [line for line in newest(read(path), "method", "target", "seed").values()
             if line["target"] == "planted"]  # fmt: skip
    heads = {"poison: AUPRC": "auprc", "facts: recall@50": "recall", "facts: MRR": "mrr"}
    columns = {head: _by_seed(lines, figure) for head, figure in heads.items()}
    return f"{_seed_table(columns, 'poison: AUPRC', {})}\n\n{where(lines)}."


def online() -> str:
    """Compare a step of `online` with a plain one, and its products with the passes alone."""
    lines = newest(read(RESULTS / "online_cost.csv"), "workload", "candidates", "what")
    heads = {
        "step": "a step over a plain one of the chosen rows",
        "capture over plain": "candidates' frozen pass over a plain forward and backward",
        "products over capture": "with products over without",
    }
    keys = dict.fromkeys((workload, candidates) for workload, candidates, _ in lines)
    body = [
        (workload, m, *(ratio(lines[workload, m, what]) for what in heads))
        for workload, m in keys
    ]  # fmt: skip
    shown = table(("model", "candidates for each row taken", *heads.values()), body)
    return f"{shown}\n\n{where(lines.values())}."


def peers(path: Path = RESULTS / "against_peers.csv") -> str:
    """Compare features and scores with those of other packages."""
    lines = newest(read(path), "model", "d", "method").values()
    names = {"smollm2": "SmolLM2-135M", "tiny": "embedded"}

    def numbers(line: Line) -> str:
        return PEERS_SIDE if line["method"].startswith("bergson") else f"{int(line['d']):,}"

    body = [
        (names[line["model"]], line["method"], numbers(line), line["rows"],
         f"{float(line['rows_s']):,.2f}",
         f"{float(line['tokens_s']):,.0f}", f"{float(line['ours_over']):,.1f}",
         f"{int(line['peak_mib']):,}", f"{int(line['row_bytes']):,}", line["spearman"],
         line["top"], line["measurements"])
        for line in lines
    ]  # fmt: skip
    head = ("model", "method", "d", "rows timed", "rows/s", "tokens/s", "ours, sjlt, is faster",
            "peak MiB", "bytes a row", "rank correlation with exact LESS", "same best 5%",
            "measurements")  # fmt: skip
    return f"{table(head, body)}\n\n{where(lines)}."


def projecting(path: Path = RESULTS / "projection_cpu.csv") -> str:
    """Compare projections on a CPU with a copy, with sgemm, a stored matrix and TRAK."""
    if not path.exists():
        return NOT_YET
    lines = newest(one_machine(read(path)), "p", "d", "rows", "method")

    def milliseconds(line: Line | None) -> str:
        if line is None:
            return ""
        cut, took = "" if line["params"] == line["p"] else "*", float(line["ms_per_row"])
        return (f"{took:,.0f}" if took >= 100 else f"{took:.3g}") + cut

    others = [name for name in PROJECTIONS[3:] if any(key[3] == name for key in lines)]
    body = []
    for p, d, rows in dict.fromkeys(key[:3] for key in lines):
        sjlt, dense = (lines[p, d, rows, method] for method in PROJECTIONS[1:3])
        rate = f"{float(dense['gops']):,.0f} / {float(dense['sgemm_gflops']):,.0f}"
        body.append((
            f"{int(p):,}", f"{int(d):,}", rows, milliseconds(lines[p, d, rows, "copy"]),
            milliseconds(sjlt),
            ratio(sjlt, "over_copy"), milliseconds(dense), rate, ratio(dense, "of_sgemm"),
            *(milliseconds(lines.get((p, d, rows, method))) for method in others),
        ))  # fmt: skip
    head = ("p", "d", "rows", "copy, ms a row", "sjlt, ms a row", "over the copy, median (rounds)",
            "rademacher, ms a row", "GFLOP/s / sgemm's", "of sgemm's rate, median (rounds)",
            *(f"{method}, ms a row" for method in others))  # fmt: skip
    said = "\\* measured on the first parameters, by proportion for p."
    return f"{table(head, body)}\n\n{said} {where(lines.values())}."


def growth(path: Path = RESULTS / "growth.csv") -> str:
    """Show how an export's time grows with rows, gradient length and dimensions."""
    if not path.exists():
        return NOT_YET
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in one_machine(read(path)):
        of = groups.setdefault((line["factor"], line["projection"]), [])
        if of and int(line["size"]) <= int(of[-1]["size"]):
            of.clear()  # another run begins, whose sizes may be others
        of.append(line)
    body = []
    for (factor, projection), of in groups.items():
        times = ", ".join(f"{float(line['seconds']):.2f}" for line in of)
        sizes = ", ".join(f"{int(line['size']):,}" for line in of)
        last = of[-1]
        alone = f"{float(last['pass_s']):.2f}" if last.get("pass_s") else UNKNOWN
        start = f"{float(last['start_s']):.2f}" if last["claim"] == "linear" else ""
        claim = last["claim"] + (" without the pass" if last.get("fitted") == "rest" else "")
        body.append((factor, projection, sizes, times, alone, start, claim, ratio(last, "slope")))
    head = ("varied", "projection", "from, to", "seconds", "of the last, the pass", "start, s",
            "claim", "slope, median (rounds)")  # fmt: skip
    return f"{table(head, body)}\n\n{where(line for of in groups.values() for line in of)}."


def gpu(path: Path = RESULTS / "gpu.csv") -> str:
    """Compare the Triton kernels with plain torch, and with what the card can do."""
    every = [{**line, "part": line.get("part") or "kernels"} for line in read(path)]
    keys = ("part", "method", "dtype", "p", "d", "rows")
    projected = [line for line in every if line["part"] in ("kernels", "features")]
    lines = newest(projected, *keys, "backend")
    body = []
    for (*case, backend), ours in lines.items():
        if backend == "triton":
            torch_ms = float(lines[*case, "torch"]["ms_per_row"])
            ms = float(ours["ms_per_row"])
            peak = f"{float(ours['of_peak']):.2f}" if ours["of_peak"] else ""
            copy = f"{float(ours['of_copy']):.3f}"
            part, name, kind, p, d, rows = case
            size = f"{int(p):,}", f"{int(d):,}", rows
            times = f"{ms:.3g}", f"{torch_ms:.3g}", f"{torch_ms / ms:.0f}"
            made = ", features" if part == "features" else ""
            body.append([name + made, kind, *size, *times, peak, copy])
    head = ("projection", "gradients", "p", "d", "rows", "ms a row", "plain torch", "times faster",
            "of the matrix peak", "of copying")  # fmt: skip
    shown = f"{table(head, body)}\n\n{where(lines.values())}."
    return "\n\n".join([shown, *gpu_others(every)])


def gpu_others(every: Iterable[Line]) -> list[str]:
    """Tell what a card does beside projecting: rotations of queries, exports of an 8B shape."""
    lines = list(every)
    turned = newest((line for line in lines if line["part"] == "rotation"), "d", "backend")
    exported = newest((line for line in lines if line["part"] == "export"), "shape", "method")
    found = []
    if turned:
        told = "; ".join(f"d = {int(d):,}, {backend}: {1e3 * float(line['ms_per_row']):.3g} us"
                         for (d, backend), line in turned.items())  # fmt: skip
        found.append(f"Rotating a query, of 256 at once: {told}. {where(turned.values())}.")
    if exported:
        told = "; ".join(f"{shape}, {method}: {ratio(line)}, aimed at {line['limit']} at most"
                         for (shape, method), line in exported.items())  # fmt: skip
        found.append(f"An export over a plain pass: {told}. {where(exported.values())}.")
    return found


def launches(path: Path = RESULTS / "launches.csv") -> str:
    """Count what an export launches on a CUDA device, beside a plain forward and backward."""
    lines = newest(read(path), "projection").values()

    def beside_plain(line: Line, ours: str) -> str:
        if not line.get(f"model_{ours}"):
            return UNKNOWN
        return f"{float(line[ours]):g} / {line[f'model_{ours}']}"

    body = [
        (line["projection"], f"{int(line['model']):,}", f"{float(line['launches']):+,.0f}",
         beside_plain(line, "waits"), beside_plain(line, "copies"))
        for line in lines
    ]  # fmt: skip
    head = ("projection", "of a plain pass", "of an export, more than these",
            "waits, export / plain", "copies to the host, export / plain")  # fmt: skip
    return f"{table(head, body)}\n\n{where(lines)}."


TABLES: dict[str, Callable[[], str]] = {
    "export": export,
    "growth": growth,
    "launches": launches,
    "projecting": projecting,
    "gpu": gpu,
    "peers": peers,
    "online": online,
    "strategies": lambda: strategies("rows", "random", "target_loss"),
    "mixtures": lambda: strategies("mixtures", "mix: static", "mean_loss"),
    "orders": lambda: strategies("orders", "order: shuffle", "mean_loss"),
    "shares": shares,
    "noise": noise,
    "passes": passes,
    "scoring": scoring,
    "throughput": throughput,
    "stress": stress,
    "scale": scale,
    "tsds": tsds,
    "subsets": subsets,
    "services": services,
    "lengths": lengths,
    "audit": audits,
    "looking": looking,
    "service_writes": service_writes,
    "rules": rules,
    "rules_each": rules_each,
    "rules_checkpoints": over_checkpoints,
    "effect": effects,
    "effect_elsewhere": effects_elsewhere,
    "wrong_rows": wrong_rows,
    "real": real,
    "real_parts": real_parts,
    "planted": planted,
    "curvature": curvature,
    "dtypes": dtypes,
    "lds": trusted,
    "lds_smooth": lambda: trusted("smooth"),
    "lds_elsewhere": trusted_elsewhere,
    "quality": quality,
}


def filled(page: str) -> str:
    """Return a page with each of its tables as the CSVs have it."""

    def one(match: re.Match[str]) -> str:
        return f"<!-- figures: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->.*?<!-- end -->", one, page, flags=re.DOTALL)


def main() -> int:
    """Rewrite the pages, or say which of them are out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = [page for page in PAGES if filled(text := page.read_text(encoding="utf-8")) != text]
    for page in stale:
        echo(f"{page.relative_to(ROOT)}: " + ("out of date" if options.check else "rewritten"))
        if not options.check:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
