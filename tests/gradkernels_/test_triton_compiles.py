"""Every kernel that a device may be given, compiled ahead of time: no GPU is needed for that.

Every run of the suite compiles all of them, for both capabilities and both widths of a batch: those
that read gradients in each type with each kind of feature, and, at the larger width, with factors
alone; the others, which read what these wrote, in the one type that it has; the transform for five
lengths. One takes about half a second, and Triton keeps it until the kernel changes.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

from gradkernels.gpu import dense, features, hadamard, launching, rotation, sparse, sums  # noqa: E402
from gradkernels.gpu.ahead import compile_ahead, disassembled, feature_constants  # noqa: E402
from gradkernels.gpu.usable import LARGEST_TRANSFORM  # noqa: E402

capabilities = pytest.mark.parametrize("capability", [80, 90])
widths = pytest.mark.parametrize("width", launching.WIDTHS)
types = pytest.mark.parametrize("x", ["*fp32", "*fp16", "*bf16"])
kinds = pytest.mark.parametrize("kind", list(features.KINDS))


def resources(program: Any) -> dict[str, int]:
    """Registers of a thread, and the bytes that it spills, as the machine code declares them."""
    told = disassembled(program, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


@capabilities
@widths
@pytest.mark.parametrize("parts", [1, 2])
def test_the_product_runs_on_tensor_cores_and_spills_nothing(
    capability: int, width: int, parts: int
) -> None:
    """Signs are the left operand in its registers: through shared memory they would be stores."""
    program = compile_ahead(dense.multiply, capability, PARTS=parts, BM=sums.OUTPUTS, BN=width,
                       CHAIN=dense.CHAIN)  # fmt: skip
    used = resources(program)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    ptx = program.asm["ptx"]
    products = len(re.findall(r"wgmma\.mma_async" if capability == 90 else r"mma\.sync", ptx))
    rows = 64 if capability == 90 else 16 * sums.WARPS  # of the tile, by one instruction a warp
    columns = width if capability == 90 else 8
    tiles = (sums.OUTPUTS // rows) * (width // columns) * (dense.CHAIN // 16)
    assert products == parts * tiles
    if capability == 90:  # two programs on a processor of 65,536 registers: one works, one waits
        assert 2 * 32 * sums.WARPS * used["REG"] <= 65_536
    loop = program.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert "ttg.local_alloc" not in loop
    assert "ttg.convert_layout" not in loop


def check_reading(program: Any) -> None:
    """Nothing spills, and a processor of 65,536 registers and 100 KB has room for two programs."""
    used = resources(program)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert 2 * 32 * sums.READING_WARPS * used["REG"] <= 65_536
    assert program.metadata.shared <= 50_000


@capabilities
@widths
@types
@kinds
def test_reading_makes_features_in_registers(
    capability: int, width: int, x: str, kind: str | None
) -> None:
    """In the dense projection's staging and in the SJLT's measure, of every kind."""
    parts = 1 if kind == "sign" or (kind is None and x != "*fp32") else 2
    read_by_both(capability, width, x, parts, feature_constants(kind))


@capabilities
@types
def test_factors_without_a_feature_are_read_in_registers(capability: int, x: str) -> None:
    unused: dict[str, Any] = feature_constants(None)
    del unused["factors"]
    read_by_both(capability, launching.WIDTHS[-1], x, 2, unused)
    given = unused | {"BN": launching.WIDTHS[-1], "BLOCK": sparse.BLOCK}
    used = resources(compile_ahead(sparse.scatter, capability, x, **given))
    assert (used["STACK"], used["LOCAL"]) == (0, 0)


def read_by_both(capability: int, width: int, x: str, parts: int, feature: dict[str, Any]) -> None:
    given = feature | {"BN": width, "CHAIN": dense.CHAIN}
    warps = sums.READING_WARPS
    check_reading(compile_ahead(dense.pack, capability, x, warps, PARTS=parts, **given))
    check_reading(compile_ahead(sparse.measure, capability, x, warps, **given))


@capabilities
@widths
@types
@kinds
def test_an_sjlt_adds_by_rows_side_by_side_and_spills_nothing(
    capability: int, width: int, x: str, kind: str | None
) -> None:
    given = feature_constants(kind) | {"BN": width, "BLOCK": sparse.BLOCK}
    program = compile_ahead(sparse.scatter, capability, x, **given)
    used = resources(program)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    text = program.asm["ttgir"]
    added = re.search(r"tt\.atomic_rmw .*: \(tensor<\d+x\d+x!tt\.ptr<i64>, (#\w+)>", text)
    assert added
    layout = re.search(rf"^{added[1]} = #ttg\.blocked<(.*)>", text, re.MULTILINE)
    assert layout
    rows = min(width, 32)  # of a warp's 32 additions at once
    assert f"sizePerThread = [1, 1], threadsPerWarp = [{32 // rows}, {rows}]" in layout[1]


@capabilities
def test_adding_up_spills_nothing(capability: int) -> None:
    for program in (
        compile_ahead(dense.gather, capability, BLOCK=launching.GATHERED),
        *(compile_ahead(sparse.fold, capability, BN=width, BLOCK=launching.GATHERED)
          for width in launching.WIDTHS),
        compile_ahead(features.settle, capability, BLOCK=launching.GATHERED),
        compile_ahead(features.settle, capability, BLOCK=launching.GATHERED, magnitudes=None,
                 largest=None),
    ):  # fmt: skip
        used = resources(program)
        assert (used["STACK"], used["LOCAL"]) == (0, 0)


@capabilities
@pytest.mark.parametrize("size", [1, 64, 1024, 4096, LARGEST_TRANSFORM])
def test_a_transform_stays_in_registers(capability: int, size: int) -> None:
    program = compile_ahead(hadamard.hadamard, capability, warps=rotation.warps_of(size),
                            SIZE=size, STAGES=size.bit_length() - 1)  # fmt: skip
    used = resources(program)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert program.metadata.shared <= 100_000
