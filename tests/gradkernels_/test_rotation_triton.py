"""Rotations by the Triton kernel, interpreted on a CPU: every bit is the processor's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from gradkernels.gpu import usable
from gradkernels.rotation import rotate

if TYPE_CHECKING:
    from interpreted import Interpreter

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")


def rows_of(k: int, dim: int) -> np.ndarray:
    """(k, d) float32 over many orders of magnitude, among them zeros and what is not finite."""
    random = np.random.default_rng(dim)
    rows = (random.standard_normal((k, dim)) * 10.0 ** random.uniform(-20, 20, (k, 1))).astype("f4")
    rows[0] = 0.0
    rows[-1, -1] = np.inf
    return rows


@pytest.mark.parametrize("dim", [1, 2, 3, 12, 64, 100, 1024])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_bit_is_the_processor_s(triton: Interpreter, dim: int, seed: int) -> None:
    rows = rows_of(4, dim)
    found = triton.rotated(torch.from_numpy(rows.copy()), seed)
    with np.errstate(invalid="ignore"):  # inf minus inf
        expected = rotate(rows, seed)
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(np.signbit(found.numpy()[:-1]), np.signbit(expected[:-1]))


def test_the_test_at_first_use_passes_and_finds_another_rotation(triton: Interpreter) -> None:
    assert triton.rotation_difference() is None
    why = triton.rotation_difference("order")
    assert why is not None
    assert "numbers differ from the processor's, first row 0, number" in why
    assert "of 50: " in why


@pytest.mark.parametrize("fault", ["differs", "raises"])
def test_a_failing_kernel_gives_way_to_the_processor_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def difference(device: torch.device) -> str | None:
        if fault == "raises":
            raise RuntimeError("no kernel image")
        return "3 of 4 numbers differ"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"device {index}")
    monkeypatch.setattr(usable, "rotation_difference", difference)
    monkeypatch.setattr(usable._log, "propagate", True)
    usable._rotation_tested.cache_clear()
    rows, device = rows_of(3, 20)[:2], torch.device("cuda", 0)
    try:
        with caplog.at_level(logging.WARNING, usable._log.name):
            for _ in range(2):
                np.testing.assert_array_equal(rotate(rows, device=device), rotate(rows))
        why = "RuntimeError: no kernel image" if fault == "raises" else "3 of 4 numbers differ"
        assert [why in record.getMessage() for record in caplog.records] == [True]
        assert "of rotations are not used on device 0" in caplog.text
    finally:
        usable._rotation_tested.cache_clear()


def test_rows_that_no_program_can_hold_are_the_processor_s() -> None:
    device = torch.device("cuda", 0)
    why = usable.rotation_refusal(device, 2 * usable.LARGEST_TRANSFORM)
    assert why == "a transform takes 16,384 numbers of a row at most"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dim", [1, 100, 1500, 4096, 8192, usable.LARGEST_TRANSFORM])
def test_a_gpu_gives_every_bit_of_the_processor(dim: int) -> None:
    device, rows = torch.device("cuda"), rows_of(100, dim)[:-1]
    assert usable.rotation_refusal(device, dim) is None
    np.testing.assert_array_equal(rotate(rows, device=device), rotate(rows))
