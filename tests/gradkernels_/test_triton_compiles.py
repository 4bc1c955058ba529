"""Every kernel that a device may be given, compiled ahead of time: no GPU is needed for that.

Every run of the suite compiles all of them, for both capabilities and both widths of a batch: those
that read gradients in each type with each kind of feature, as contiguous rows; at the larger width,
also with factors alone, and as slices at an odd column and strided gradients, which Triton compiles
apart. The others, which read what these wrote, have one type and one place; the transform is
compiled for five lengths. One takes about half a second, and Triton keeps it until the kernel
changes.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

from gradkernels.gpu import dense, features, hadamard, launching, rotation, sparse, sums  # noqa: E402
from gradkernels.gpu.ahead import (  # noqa: E402
    PLACES,
    compile_ahead,
    disassembled,
    feature_constants,
)
from gradkernels.gpu.usable import LARGEST_TRANSFORM  # noqa: E402

capabilities = pytest.mark.parametrize("capability", [80, 90])
widths = pytest.mark.parametrize("width", launching.WIDTHS)
types = pytest.mark.parametrize("x", ["*fp32", "*fp16", "*bf16"])
kinds = pytest.mark.parametrize("kind", list(features.KINDS))
#: Bytes of shared memory of a processor, the least of the cards that run such code: 8.6 and 8.9 run
#: that of 8.0. A program takes 1,024 for itself.
SHARED = {80: 100 << 10, 90: 228 << 10}
REGISTERS, WARPS_AT_ONCE = 65_536, 48


def resources(program: Any) -> dict[str, int]:
    """Registers of a thread, and the bytes that it spills, as the machine code declares them."""
    told = disassembled(program, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


def programs_at_once(program: Any, capability: int, warps: int) -> int:
    """Programs that a processor has room for; registers are given out 8 to a thread."""
    used = resources(program)
    assert (used["STACK"], used["LOCAL"]) == (0, 0), "it spills"
    return min(
        REGISTERS // (-(-used["REG"] // 8) * 8 * 32 * warps),
        SHARED[capability] // (program.metadata.shared + 1024),
        WARPS_AT_ONCE // warps,
    )


@capabilities
@widths
@pytest.mark.parametrize("parts", [1, 2])
def test_the_product_runs_on_tensor_cores_and_spills_nothing(
    capability: int, width: int, parts: int
) -> None:
    """Signs are the left operand in its registers: through shared memory they would be stores."""
    program = compile_ahead(dense.multiply, capability, PARTS=parts, BM=sums.OUTPUTS, BN=width,
                       CHAIN=dense.CHAIN)  # fmt: skip
    assert programs_at_once(program, capability, sums.WARPS) >= 2  # one works, one waits
    ptx = program.asm["ptx"]
    products = len(re.findall(r"wgmma\.mma_async" if capability == 90 else r"mma\.sync", ptx))
    rows = 64 if capability == 90 else 16 * sums.WARPS  # of the tile, by one instruction a warp
    columns = width if capability == 90 else 8
    tiles = (sums.OUTPUTS // rows) * (width // columns) * (dense.CHAIN // 16)
    assert products == parts * tiles
    loop = program.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert "ttg.local_alloc" not in loop
    assert "ttg.convert_layout" not in loop


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
@pytest.mark.parametrize("kind", [None, "adam_marginal"])
@pytest.mark.parametrize("place", PLACES[1:])
def test_gradients_are_read_in_registers_wherever_they_lie(
    capability: int, x: str, kind: str | None, place: str
) -> None:
    """Triton makes other code of a stride that is 1, and of pointers at multiples of 16 bytes."""
    parts = 1 if kind is None and x != "*fp32" else 2
    width, given = launching.WIDTHS[-1], feature_constants(kind)
    read_by_both(capability, width, x, parts, given, place)
    check_scatter(capability, width, x, given, place)


@capabilities
@pytest.mark.parametrize("kernel", [dense.pack, sparse.measure])
@pytest.mark.parametrize("place", PLACES[:2])
def test_a_warp_reads_along_the_rows_of_contiguous_gradients(
    capability: int, kernel: Any, place: str
) -> None:
    """It would read down the columns if Triton did not know that their stride is 1."""
    given = feature_constants(None) | {"BN": 64, "PARTS": 2, "CHAIN": dense.CHAIN}
    given = {name: value for name, value in given.items() if name in kernel.arg_names}
    program = compile_ahead(kernel, capability, "*fp32", sums.READING_WARPS, place, **given)
    text = program.asm["ttgir"]
    read = re.search(r"tt\.load .* : tensor<64x64x!tt\.ptr<f32>, (#\w+)>", text)
    assert read
    layout = re.search(rf"^{read[1]} = #ttg\.blocked<(.*)>", text, re.MULTILINE)
    assert layout
    assert "order = [1, 0]" in layout[1]


@capabilities
@types
def test_factors_without_a_feature_are_read_in_registers(capability: int, x: str) -> None:
    unused: dict[str, Any] = feature_constants(None)
    del unused["factors"]
    read_by_both(capability, launching.WIDTHS[-1], x, 2, unused)
    check_scatter(capability, launching.WIDTHS[-1], x, unused)


def read_by_both(
    capability: int, width: int, x: str, parts: int, feature: dict[str, Any], place: str = PLACES[0]
) -> None:
    """Nothing spills in staging or measuring, and a processor has room for two programs.

    For one, where slices at an odd column are measured: a thread reads one number of a row then,
    and rows are added up across a whole warp, 16 at a time.
    """
    given = feature | {"BN": width, "CHAIN": dense.CHAIN}
    warps = sums.READING_WARPS
    for kernel, more in ((dense.pack, {"PARTS": parts}), (sparse.measure, {})):
        program = compile_ahead(kernel, capability, x, warps, place, **given, **more)
        alone = kernel is sparse.measure and place == "cut"
        assert programs_at_once(program, capability, warps) >= (1 if alone else 2)


def check_scatter(
    capability: int, width: int, x: str, feature: dict[str, Any], place: str = PLACES[0]
) -> Any:
    """Nothing spills, and a processor has room for two programs; return the code."""
    given = feature | {"BN": width, "BLOCK": sparse.BLOCK}
    program = compile_ahead(sparse.scatter, capability, x, sums.WARPS, place, **given)
    assert programs_at_once(program, capability, sums.WARPS) >= 2  # one adds, one waits
    return program


@capabilities
@widths
@types
@kinds
def test_an_sjlt_adds_by_rows_side_by_side_and_spills_nothing(
    capability: int, width: int, x: str, kind: str | None
) -> None:
    text = check_scatter(capability, width, x, feature_constants(kind)).asm["ttgir"]
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
    """Of whole rows, and of the later part of rows of an odd length."""
    warps = rotation.warps_of(size)
    for place in ("contiguous", "cut"):
        program = compile_ahead(hadamard.hadamard, capability, warps=warps, place=place,
                                SIZE=size, STAGES=size.bit_length() - 1)  # fmt: skip
        assert programs_at_once(program, capability, warps) >= 1
