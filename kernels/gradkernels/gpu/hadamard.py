"""Kernel of the Hadamard transform of rows.

A program holds a row's m numbers in registers and adds and subtracts pairs of them, neighbours
first, log2(m) times: the same sums of two float32, in the same order, as the loop for processors
has (`gradkernels.cpu.loops.hadamard_loop`), so that every bit is the same.

Arguments bear no annotations: Triton reads these as its own types.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride"])
def hadamard(x, stride, scale, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """Apply Sylvester's matrix times `scale` to SIZE numbers of a row, in place.

    Args:
        x: (rows, SIZE) float32; one program takes one row.
        stride: of the rows, in elements.
        scale: number.
        SIZE: 2**STAGES.
        STAGES: of the transform.
    """
    at = x + tl.program_id(0).to(tl.int64) * stride + tl.arange(0, SIZE)
    v = tl.load(at)
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(v, (SIZE >> (stage + 1), 2, 1 << stage))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (SIZE,))
    tl.store(at, v * scale)
