"""What the kernels should take on a card, by their machine code, beside measured times.

    python benchmarks/gpu_model.py [--card A100] [--kind adam_marginal] [--rows 16 64]

No GPU is needed. Each kernel is compiled for the card's compute capability, for contiguous
gradients, and its instructions are counted by the unit that executes them, those in its loop as
often as the loop runs. Beside them stand the products of the tensor cores, the bytes of memory, and
the second-level cache's additions. A card takes at least as long as its busiest unit (`bound`), and
as long as all units one after the other where nothing overlaps (`in turn`). Launches are not
counted: a pass of a few microseconds takes longer than this says.

The model was made after the H200 had been measured. Measured times are those of results/gpu.csv, of
that card, whose rows are projected as they are: with `--kind` or another card there are none.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from gpu import CASES, Case
from gradkernels.gpu import dense, features, hadamard, rotation, sparse, sums
from gradkernels.gpu.ahead import compile_ahead, disassembled, feature_constants
from gradkernels.gpu.launching import GATHERED, width_of
from gradkernels.rotation import ROUNDS
from report import RESULTS, echo

S = 8  # of the SJLT
ROTATED = [(rows, dim) for rows in (64, 4096) for dim in (4096, 8192)]


@dataclass(frozen=True)
class Card:
    """Rates of a card, from its maker's tables; H200 and H100 SXM differ in memory alone.

    Attributes:
        capability: 90 for 9.0.
        processors: streaming multiprocessors, of 4 schedulers each.
        clock: cycles a second under load.
        tensor: float16 operations a second.
        memory: bytes a second.
        cache: bytes a second of the second-level cache, read or added to.
        cycles: unit -> cycles for which one instruction of a warp takes its part of it (CUDA C++
            programming guide, throughput of arithmetic instructions: 128 / results a cycle and
            processor).
    """

    capability: int
    processors: int
    clock: float
    tensor: float
    memory: float
    cache: float
    cycles: Mapping[str, int]


_HOPPER = {"integer": 2, "multiply": 2, "float": 1, "double": 2, "special": 8, "memory": 4}
CARDS = {
    "H200": Card(90, 132, 1.83e9, 990e12, 4.2e12, 5.2e12, _HOPPER),
    # SXM, 80 GB; its cache reads 5,120 bytes a cycle (NVIDIA A100 architecture, 2020).
    "A100": Card(80, 108, 1.41e9, 312e12, 2.04e12, 7.2e12, _HOPPER | {"float": 2, "double": 4}),
}

UNITS = {
    "integer": "LOP3|SHF|IADD3|VIADD|VIADDMNMX|VIMNMX|IMNMX|PRMT|SEL|ISETP|LEA|SGXT|FSETP|FSEL|"
               "FMNMX|BMSK|PLOP3|DSETP|FLO|POPC",
    "multiply": "IMAD",
    "float": "FFMA|FMUL|FADD",
    "double": "DADD|DMUL|DFMA",
    "special": "F2F|I2F|F2I|MUFU|I2FP|F2FP",
    "memory": "(?!LDGDEPBAR)(?:LD|ST|RED|ATOM)[A-Z]*",
}  # fmt: skip


@dataclass(frozen=True)
class Code:
    """Instructions of a warp by unit: outside of the loop, and in one round of it."""

    once: Mapping[str, int]
    each: Mapping[str, int]

    def cycles(self, rounds: float, card: Card) -> dict[str, float]:
        """Cycles of a scheduler for a warp whose loop runs so often."""
        units = {*self.once, *self.each}
        return {u: (self.once.get(u, 0) + rounds * self.each.get(u, 0)) * card.cycles.get(u, 1)
                for u in units}  # fmt: skip


@cache
def code_of(kernel: Any, capability: int, *given: Any, **constants: Any) -> Code:  # noqa: ANN401
    """Count the instructions of a kernel, before and behind its longest loop and in it.

    Args:
        kernel: of `gradkernels.gpu`.
        capability: of the card.
        *given: type of gradients and warps, for `compile_ahead`.
        **constants: for it, too.
    """
    text = disassembled(compile_ahead(kernel, capability, *given, **constants), "-sass")
    found = [(int(at, 16), told.strip())
             for at, told in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", text)]  # fmt: skip
    low, high = 0, -1
    for at, told in found:
        to = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", told)
        if to and int(to[1], 16) < at and at - int(to[1], 16) > high - low:
            low, high = int(to[1], 16), at
    once: Counter[str] = Counter()
    each: Counter[str] = Counter()
    for at, told in found:
        name = re.sub(r"^@!?U?P\w+\s+", "", told)
        if name.startswith("NOP") or (name.startswith("BRA") and f"0x{at:x}" in name):
            continue
        into = each if low <= at <= high else once
        into["issue"] += 1
        for unit, pattern in UNITS.items():
            if re.match(rf"(?:{pattern})\b", name):
                into[unit] += 1
                break
    return Code(once, each)


@dataclass(frozen=True)
class Work:
    """What a pass asks of a card: programs of so many warps, and what is beside their instructions.

    Attributes:
        name: of the kernel.
        programs: how many.
        warps: of each.
        code: returns the kernel's instructions; asked when time is, since it compiles.
        rounds: of the kernel's loop.
        flops, memory, cache: operations of tensor cores, bytes of memory and of the cache.
    """

    name: str
    programs: float
    warps: int
    code: Callable[[], Code]
    rounds: float = 0.0
    flops: float = 0.0
    memory: float = 0.0
    cache: float = 0.0

    def seconds(self, card: Card) -> dict[str, float]:
        """Seconds that each unit is busy."""
        rounds = self.programs * self.warps / (4 * card.processors) / card.clock
        cycles = self.code().cycles(self.rounds, card)
        busy = {unit: count * rounds for unit, count in cycles.items()}
        return busy | {"tensor": self.flops / card.tensor, "bytes": self.memory / card.memory,
                       "cache": self.cache / card.cache}  # fmt: skip

    def bounds(self, card: Card) -> tuple[str, float, float]:
        """Name the busiest unit; return its seconds, and those of all units in turn."""
        busy = self.seconds(card)
        # Instructions of all units share the schedulers: `issue` is no unit of its own.
        total = max(sum(v for k, v in busy.items() if k != "issue"), busy["issue"])
        longest = max(busy, key=busy.__getitem__)
        return longest, busy[longest], total


def rademacher(case: Case, kind: str | None, card: Card) -> Iterator[Work]:
    """Yield the passes of the dense projection: staging, products of signs, adding up."""
    width, x = width_of(case.rows), _pointer(case)
    parts = 1 if kind == "sign" or (kind is None and case.dtype.itemsize == 2) else 2
    chains, tiles = -(-case.p // dense.CHAIN), -(-case.d // sums.OUTPUTS)
    given = feature_constants(kind) | {"PARTS": parts, "BN": width, "CHAIN": dense.CHAIN}
    pack = partial(code_of, dense.pack, card.capability, x, sums.READING_WARPS, **given)
    staged = chains * (dense.CHAIN * (2 * parts * width + 8) + 12 * width)
    read = case.rows * case.p * case.dtype.itemsize + _vectors(case, kind)
    yield Work("pack", chains, sums.READING_WARPS, pack,
               memory=read + staged)  # fmt: skip
    multiply = partial(code_of, dense.multiply, card.capability, PARTS=parts, BM=sums.OUTPUTS,
                       BN=width, CHAIN=dense.CHAIN)  # fmt: skip
    flops = 2.0 * parts * chains * dense.CHAIN * tiles * sums.OUTPUTS * width
    stages = -(-chains // sums.CHAINS)
    splits = max(1, sums.PROGRAMS // tiles)
    size = tiles * sums.OUTPUTS * width
    yield Work("multiply", tiles * splits * stages, sums.WARPS, multiply,
               rounds=chains / splits / stages, flops=flops,
               memory=staged + 4.0 * stages * splits * size, cache=tiles * staged)  # fmt: skip
    gather = partial(code_of, dense.gather, card.capability, BLOCK=GATHERED)
    yield Work("gather", stages * -(-size // GATHERED), sums.WARPS, gather, rounds=splits,
               memory=stages * size * (4.0 * splits + 16))  # fmt: skip
    yield _settle(card, width, stages, chains / stages, largest=False)


def sjlt(case: Case, kind: str | None, card: Card) -> Iterator[Work]:
    """Yield the passes of the SJLT: measuring, adding, whole numbers onto sums."""
    width, x = width_of(case.rows), _pointer(case)
    read = case.rows * case.p * case.dtype.itemsize + _vectors(case, kind)
    given = feature_constants(kind) | {"BN": width}
    measure = partial(code_of, sparse.measure, card.capability, x, sums.READING_WARPS,
                      CHAIN=sparse.CHAIN, **given)  # fmt: skip
    chains = -(-case.p // sparse.CHAIN)
    yield Work("measure", sums.PROGRAMS, sums.READING_WARPS, measure,
               rounds=chains / sums.PROGRAMS, memory=read)  # fmt: skip
    yield _settle(card, width, 1, sums.PROGRAMS, largest=True)
    scatter = partial(code_of, sparse.scatter, card.capability, x, BLOCK=sparse.BLOCK, **given)
    yield Work("scatter", -(-case.p // sparse.BLOCK), sums.WARPS, scatter, rounds=S,
               memory=read, cache=8.0 * S * case.p * width)  # fmt: skip
    fold = partial(code_of, sparse.fold, card.capability, BN=width, BLOCK=GATHERED)
    size = case.d * width
    yield Work("fold", -(-size // GATHERED), sums.WARPS, fold, memory=32.0 * size)


def _settle(card: Card, width: int, times: int, parts: float, *, largest: bool) -> Work:
    """Sum the parts of each row's squares, so often; with the largest magnitude or without."""
    unused: dict[str, Any] = {} if largest else {"magnitudes": None, "largest": None}
    settle = partial(code_of, features.settle, card.capability, BLOCK=GATHERED, **unused)
    return Work("settle", times * width, sums.WARPS, settle, rounds=-(-parts // GATHERED),
                memory=times * width * parts * (12.0 if largest else 8.0))  # fmt: skip


def rotated(rows: int, dim: int, card: Card) -> Work:
    """Count the transforms of a rotation, of rows whose length is a power of two."""
    warps = rotation.warps_of(dim)
    kernel = partial(code_of, hadamard.hadamard, card.capability, warps=warps, SIZE=dim,
                     STAGES=dim.bit_length() - 1)  # fmt: skip
    return Work("hadamard", ROUNDS * rows, warps, kernel, memory=ROUNDS * 8.0 * rows * dim)


def _pointer(case: Case) -> str:
    return "*bf16" if case.dtype.itemsize == 2 else "*fp32"


def _vectors(case: Case, kind: str | None) -> float:
    """Bytes of a feature's vectors, read once for all rows."""
    return case.p * 4.0 * {None: 0, "sign": 0, "adam": 2, "adam_marginal": 3}[kind]


METHODS = {"rademacher": rademacher, "sjlt": sjlt}


def measured() -> dict[tuple[str, str, int, int, int], float]:
    """Milliseconds a row of the Triton kernels, the latest of each case."""
    with (RESULTS / "gpu.csv").open(encoding="utf-8") as file:
        return {
            (line["method"], line["dtype"], int(line["p"]), int(line["d"]), int(line["rows"])):
            float(line["ms_per_row"])
            for line in csv.DictReader(file) if line["backend"] == "triton"
        }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=["sign", "adam", "adam_marginal"], help="of the feature")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--card", choices=CARDS, default="H200")
    options = parser.parse_args()
    card = CARDS[options.card]
    told = measured() if options.kind is None and options.card == "H200" else {}
    echo(f"{'p':>11}{'d':>6}{'rows':>5} {'type':<9}{'kernel':<20}{'busiest':<10}{'bound':>9}"
         f"{'in turn':>9}{'measured':>9}   ms a row")  # fmt: skip
    for case in CASES:
        if case.rows not in options.rows:
            continue
        dtype = str(case.dtype).removeprefix("torch.")
        for method, passes in METHODS.items():
            bound = turns = 0.0
            for work in passes(case, options.kind, card):
                found = work.bounds(card)
                bound, turns = bound + found[1], turns + found[2]
                show(case, dtype, f"{method}.{work.name}", found, "")
            key = (method, dtype, case.p, case.d, case.rows)
            show(case, dtype, method, ("", bound, turns), f"{told[key]:.3f}" if key in told else "")
    for rows, dim in ROTATED:
        show(Case(dim, dim, rows), "float32", "hadamard", rotated(rows, dim, card).bounds(card), "")


def show(case: Case, dtype: str, name: str, found: tuple[str, float, float], measured: str) -> None:
    """Print a line: seconds of all rows, as milliseconds a row."""
    busiest, bound, turns = found
    each = 1e3 / case.rows
    echo(f"{case.p:>11,}{case.d:>6}{case.rows:>5} {dtype:<9}{name:<20}{busiest:<10}"
         f"{bound * each:>9.3g}{turns * each:>9.3g}{measured:>9}")  # fmt: skip


if __name__ == "__main__":
    main()
