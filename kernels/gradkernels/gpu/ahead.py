"""Compile the kernels for a card that is not there: what a test or a model of their time reads."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from gradkernels.features import VECTORS
from gradkernels.gpu import features, sums
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: NVIDIA's tools, as they come with Triton.
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: Places of a block's gradients in memory, which Triton compiles apart: rows that are "contiguous";
#: "cut" from those at an odd column, so that they begin at no multiple of 16 bytes; "strided" in
#: both directions.
PLACES = ("contiguous", "cut", "strided")
#: Pointers that a cut moves: the gradients, and vectors of a feature beside them.
CUT = ("x", "a", "base", "still", "pull")
#: Numbers that are multiples of 16: rows of gradients from LoRA's layers, and sums of a batch.
SIXTEENS = {
    "contiguous": ("row_stride", "size"), "cut": ("row_stride", "size"), "strided": ("size",),
}  # fmt: skip

#: Type of each argument that is no int32.
TYPES = {
    "x": "*fp32", "high": "*fp16", "low": "*fp16", "steps": "*fp32", "state_a": "*u32",
    "state_b": "*u32", "offsets": "*u32", "places": "*u32", "partial": "*fp32", "sums": "*fp64",
    "largest": "*fp32", "whole": "*i64", "bounds": "*i32", "squares": "*fp64",
    "magnitudes": "*i32", "factors": "*fp32", "a": "*fp32", "base": "*fp32", "still": "*fp32",
    "pull": "*fp32", "curve": "fp32", "outer": "fp32", "scale": "fp32",
}  # fmt: skip


def feature_constants(kind: str | None) -> dict[str, Any]:
    """Return the constants of a kernel that makes features: its kind, None for unused vectors."""
    unused = {"a", "base", "still", "pull"} - set(VECTORS[kind] if kind else ())
    factors = {} if kind else {"factors": None}
    return factors | dict.fromkeys(unused) | {"KIND": features.KINDS[kind]}


def compile_ahead(
    kernel: Any,  # noqa: ANN401 - Triton's
    capability: int,
    x: str = "*fp32",
    warps: int = sums.WARPS,
    place: str = PLACES[0],
    **constants: int | None,
) -> Any:  # noqa: ANN401
    """Compile a kernel as the first launch of such arguments does.

    Triton compiles one kernel for each pattern of what it takes for constant or aligned: a stride
    of 1, multiples of 16. Memory of torch's own begins at one.

    Args:
        kernel: of `gradkernels.gpu`.
        capability: of the card, 90 for 9.0.
        x: type of its gradients.
        warps: of a program.
        place: of `PLACES`.
        **constants: values of its `tl.constexpr`, and None for pointers that are not given.

    Returns:
        Triton's compiled kernel: `asm` with ttgir, ptx and cubin; `metadata`.
    """
    names = kernel.arg_names
    if place != "strided" and "column_stride" in names:
        constants = {"column_stride": 1, **constants}
    types = {name: "constexpr" if name in constants else (TYPES | {"x": x}).get(name, "i32")
             for name in names}  # fmt: skip
    moved = CUT if place == "cut" else ()
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names
               if (types[name].startswith("*") and name not in moved)
               or (types[name] == "i32" and name in SIXTEENS[place])}  # fmt: skip
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": sums.STAGES}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassembled(program: Any, *flags: str) -> str:  # noqa: ANN401 - Triton's
    """Return what cuobjdump tells of a compiled kernel's machine code.

    Args:
        program: of `compile_ahead`.
        *flags: "-sass" for its instructions, "--dump-resource-usage" for registers and the stack.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(program.asm["cubin"])
        return subprocess.run(
            [TOOLS / "cuobjdump", *flags, cubin], capture_output=True, text=True, check=True
        ).stdout
