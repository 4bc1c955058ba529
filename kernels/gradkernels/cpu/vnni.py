"""The question asked before bytes are multiplied: does torch use VNNI on this processor?"""

from __future__ import annotations

import torch


def vnni_missing() -> str | None:
    """Return why backend "int8" can't be used here; None where it can.

    `torch._int_mm` gives the same numbers anywhere. It hands them to oneDNN where there is
    avx512_vnni (torch 2.11: avx_vnni alone is not enough); elsewhere a plain loop of its own
    multiplies, one pair after the other, at a fiftieth of sgemm's rate.
    """
    if not torch.cpu.get_capabilities().get("avx512_vnni", False):
        return "torch finds no avx512_vnni in this processor"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch was built without oneDNN, which would use the processor's avx512_vnni"
    return None
