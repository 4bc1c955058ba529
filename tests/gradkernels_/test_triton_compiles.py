"""Every kernel that a device may be given, compiled ahead of time: no GPU is needed for that."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

from gradkernels.features import VECTORS  # noqa: E402
from gradkernels.gpu import dense, features, launching, sparse, sums  # noqa: E402

CAPABILITIES = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "high": "*fp16", "low": "*fp16", "steps": "*fp32", "state_a": "*u32", "state_b": "*u32",
    "offsets": "*u32", "places": "*u32", "partial": "*fp32", "sums": "*fp64",
    "largest": "*fp32", "whole": "*i64", "bounds": "*i32", "squares": "*fp64",
    "magnitudes": "*i32", "factors": "*fp32", "a": "*fp32", "base": "*fp32", "still": "*fp32",
    "pull": "*fp32", "curve": "fp32", "outer": "fp32",
}  # fmt: skip


def feature_of(kind: str | None) -> dict[str, int | None]:
    """Constants of a kernel that makes features: its kind, and None for vectors without a use."""
    unused = {"a", "base", "still", "pull"} - set(VECTORS[kind] if kind else ())
    factors = {} if kind else {"factors": None}
    return factors | dict.fromkeys(unused) | {"KIND": features.KINDS[kind]}


def compiled(
    kernel: Any, capability: int, x: str = "*fp32", warps: int = sums.WARPS, **constants: int | None
) -> Any:
    """Compile a kernel for pointers as torch gives them: at multiples of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else (POINTERS | {"x": x}).get(name, "i32")
             for name in names}  # fmt: skip
    aligned = {(names.index(name),): [["tt.divisibility", 16]]
               for name in names if types[name].startswith("*")}  # fmt: skip
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": sums.STAGES}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def resources(program: Any, folder: Path) -> dict[str, int]:
    """Registers of a thread, and the bytes that it spills, as the machine code declares them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(program.asm["cubin"])
    told = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", cubin],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", launching.WIDTHS)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_product_runs_on_tensor_cores_and_spills_nothing(
    capability: int, width: int, parts: int, tmp_path: Path
) -> None:
    """Signs are the left operand in its registers: through shared memory they would be stores."""
    program = compiled(dense.multiply, capability, PARTS=parts, BM=sums.OUTPUTS, BN=width,
                       CHAIN=dense.CHAIN)  # fmt: skip
    used = resources(program, tmp_path)
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


def check_reading(program: Any, folder: Path) -> None:
    """Nothing spills, and a processor of 65,536 registers and 100 KB has room for two programs."""
    used = resources(program, folder)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert 2 * 32 * sums.READING_WARPS * used["REG"] <= 65_536
    assert program.metadata.shared <= 50_000


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", launching.WIDTHS)
@pytest.mark.parametrize(("x", "kind"), [("*fp32", None), ("*bf16", None), ("*bf16", "sign"),
                                         ("*fp32", "adam"), ("*fp16", "adam_marginal"),
                                         ("*fp32", "adam_marginal")])  # fmt: skip
def test_reading_makes_features_in_registers(
    capability: int, width: int, x: str, kind: str | None, tmp_path: Path
) -> None:
    """In the dense projection's staging and in the SJLT's measure, of every kind."""
    parts = 1 if kind == "sign" or (kind is None and x != "*fp32") else 2
    given = feature_of(kind) | {"BN": width, "CHAIN": dense.CHAIN}
    warps = sums.READING_WARPS
    check_reading(compiled(dense.pack, capability, x, warps, PARTS=parts, **given), tmp_path)
    check_reading(compiled(sparse.measure, capability, x, warps, **given), tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", launching.WIDTHS)
@pytest.mark.parametrize(
    ("x", "kind"),
    [("*fp32", None), ("*fp16", None), ("*bf16", "sign"), ("*fp32", "adam_marginal")],
)
def test_an_sjlt_adds_by_rows_side_by_side_and_spills_nothing(
    capability: int, width: int, x: str, kind: str | None, tmp_path: Path
) -> None:
    given = feature_of(kind) | {"BN": width, "BLOCK": sparse.BLOCK}
    program = compiled(sparse.scatter, capability, x, **given)
    used = resources(program, tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    text = program.asm["ttgir"]
    added = re.search(r"tt\.atomic_rmw .*: \(tensor<\d+x\d+x!tt\.ptr<i64>, (#\w+)>", text)
    assert added
    layout = re.search(rf"^{added[1]} = #ttg\.blocked<(.*)>", text, re.MULTILINE)
    assert layout
    rows = min(width, 32)  # of a warp's 32 additions at once
    assert f"sizePerThread = [1, 1], threadsPerWarp = [{32 // rows}, {rows}]" in layout[1]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_adding_up_spills_nothing(capability: int, tmp_path: Path) -> None:
    for program in (
        compiled(dense.gather, capability, BLOCK=launching.GATHERED),
        compiled(sparse.fold, capability, BN=launching.WIDTHS[0], BLOCK=launching.GATHERED),
        compiled(features.settle, capability, BLOCK=launching.GATHERED),
        compiled(features.settle, capability, BLOCK=launching.GATHERED, magnitudes=None,
                 largest=None),
    ):  # fmt: skip
        used = resources(program, tmp_path)
        assert (used["STACK"], used["LOCAL"]) == (0, 0)
