"""The random bits: pinned, equal in NumPy, torch and numba, and random where it counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec, canary, portable, project, randomness
from gradkernels.cpu import compiled
from gradkernels.cpu.normals import PART
from gradkernels.reference import matrix_rows, scale

SEED = 0x123456789ABCDEF


def test_mix_is_pinned() -> None:
    got = randomness.mix(np.array([0, 1, 2**32 - 1], dtype=np.uint32))
    assert got.tolist() == [0x0, 0x6D3FA73, 0xD9B56683]
    assert [randomness.mix_int(x) for x in (0, 1, 2**32 - 1)] == got.tolist()


@pytest.mark.parametrize(
    ("method", "keys", "expected"),
    [
        (
            "rademacher",
            (0x1DFF4E37, 0x62D3589D, 0xD931D714),
            [[0x58B32A4D, 0xB886080E], [0xCE9C082B, 0x402481DA], [0x107F94CE, 0xFB809FBE]],
        ),
        (
            "sjlt",
            (0x550FC23D, 0x98CAB9E, 0x4F72F961),
            [[0xD8A5A9A, 0x6E768FAE], [0x3564AE6, 0x5E08E611], [0x7C787E9C, 0x39CB2C7A]],
        ),
        (
            "gaussian",
            (0x9DB3333F, 0xEC2BFB2, 0x88872853),
            [[0x315BA762, 0xEEEDA9DB], [0x77BF79DA, 0xF5EB615], [0xE8080DEC, 0x26F367F3]],
        ),
    ],
)
def test_words_are_pinned(
    method: str, keys: tuple[int, int, int], expected: list[list[int]]
) -> None:
    spec = ProjectionSpec(method, p=2**31 - 1, d=100, seed=SEED)  # type: ignore[arg-type]
    assert randomness.derive_keys(spec) == keys
    got = randomness.words(randomness.Keys(*keys), np.array([0, 1, 2**31 - 2]), np.arange(2))
    assert got.tolist() == expected


def test_rademacher_signs_are_pinned() -> None:
    spec = ProjectionSpec("rademacher", p=1000, d=40, seed=3)
    row = randomness.signs(spec, np.array([999]), 40)[0]
    assert "".join("+-"[int(v < 0)] for v in row) == "+--+++++-+--++---++-------++++-+++--+---"


def test_sjlt_entries_are_pinned() -> None:
    spec = ProjectionSpec("sjlt", p=1000, d=4097, seed=3)
    outputs, sign = randomness.sjlt_entries(spec, np.array([0, 1, 999]))
    assert outputs.tolist() == [
        [33, 703, 1070, 1806, 2110, 2940, 3330, 3730],
        [444, 878, 1337, 1540, 2460, 2866, 3552, 3812],
        [18, 953, 1039, 1884, 2466, 2668, 3582, 4068],
    ]
    assert sign.tolist() == [
        [-1, 1, -1, -1, -1, -1, 1, 1],
        [1, -1, 1, -1, -1, -1, 1, -1],
        [1, 1, 1, 1, -1, 1, 1, -1],
    ]


def test_gaussian_entries_are_pinned() -> None:
    spec = ProjectionSpec("gaussian", p=1000, d=5, seed=3)
    expected = [
        [1.4209582633, 0.0636102789, -0.0644984055, -0.3223923918, -1.4894273766],
        [1.6586925128, 1.1528740277, 1.6829533908, 0.3859709770, 0.6363412046],
    ]
    got = randomness.gaussians(spec, np.array([0, 999]), 5)
    np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("rademacher", [-0.482421875, 1.63525390625, 1.25390625, 2.125]),
        (
            "sjlt",
            [1.6130873445818115, 0.5248058141618906, -2.762135864009951, -0.14363106492851746],
        ),
        ("gaussian", [-1.378657704510323, -0.2753990282387297, 1.8891675584, 1.6025793731999625]),
    ],
)
def test_the_canary_is_pinned(method: str, expected: list[float]) -> None:
    got = canary(ProjectionSpec(method, p=4_884_480, d=4096, seed=1))  # type: ignore[arg-type]
    assert got.shape == (16,)
    np.testing.assert_allclose(
        got[: len(expected)], expected, rtol=1e-9 if method == "gaussian" else 0
    )


def test_the_canary_equals_the_oracle_and_pads_small_outputs() -> None:
    spec = ProjectionSpec("rademacher", p=10_000, d=7)
    k = np.arange(4096)
    x = np.bincount(k * 10_000 // 4096, 1 + k % 64 / 64, minlength=10_000)
    expected = x @ matrix_rows(spec, np.arange(10_000)) * scale(spec)
    np.testing.assert_allclose(canary(spec)[:7], expected, rtol=1e-12)
    assert not canary(spec)[7:].any()


def test_torch_words_equal_numpy_words() -> None:
    j = np.concatenate([np.arange(2000), 2**31 - 1 - np.arange(2000)])
    for seed in (0, 1, SEED, 2**63 - 1):
        keys = randomness.derive_keys(ProjectionSpec("rademacher", p=1, d=1, seed=seed))
        expected = randomness.words(keys, j, np.arange(129))
        got = portable.words(keys, torch.from_numpy(j), torch.arange(129))
        assert np.array_equal(got.numpy().view(np.uint32), expected)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(("method", "d", "s"), [("rademacher", 97, 1), ("sjlt", 97, 8)])
def test_every_bit_of_the_matrix_is_the_reference_bit(
    backend: str, method: str, d: int, s: int
) -> None:
    spec = ProjectionSpec(method, p=517, d=d, seed=SEED, s=s)  # type: ignore[arg-type]
    got = project(torch.eye(517), spec, backend=backend)  # type: ignore[arg-type]
    entries = torch.round(got.double() / scale(spec)).numpy()
    assert np.array_equal(entries, matrix_rows(spec, np.arange(517)))


@pytest.mark.parametrize(("start", "d"), [(0, 65), (2**31 - 401, 7), (12_345, 2 * PART + 9)])
def test_compiled_gaussians_have_every_digit_of_float32(start: int, d: int) -> None:
    # Small ones, too: a cosine near a right angle, a radius near 0. And -0.0 has a sign.
    spec = ProjectionSpec("gaussian", p=2**31 - 1, d=d, seed=SEED)
    rows, pairs = 400, -(-d // 2)
    keys, planar = randomness.derive_keys(spec), np.empty((rows, 2 * pairs), np.float32)
    even, odd = (randomness.word_offsets(keys, 2 * pairs)[first::2].copy() for first in (0, 1))
    compiled.gaussian()(start, np.uint32(keys.a), np.uint32(keys.b), even, odd, planar)
    got = planar.reshape(rows, 2, pairs).transpose(0, 2, 1).reshape(rows, -1)
    expected = randomness.gaussians(spec, start + np.arange(rows), 2 * pairs)
    np.testing.assert_allclose(got, expected, rtol=6e-7)
    assert np.array_equal(np.signbit(got), np.signbit(expected))


def test_torch_gaussians_equal_numpy_gaussians() -> None:
    spec = ProjectionSpec("gaussian", p=5000, d=65, seed=SEED)
    got = portable.gaussians(randomness.derive_keys(spec), torch.arange(5000), 65)
    np.testing.assert_allclose(
        got.numpy(), randomness.gaussians(spec, np.arange(5000), 65), atol=2e-6
    )


def _sign_matrix(outputs: int, params: np.ndarray, seed: int = 0) -> np.ndarray:
    spec = ProjectionSpec("rademacher", p=2**31 - 1, d=outputs, seed=seed)
    return randomness.signs(spec, params, outputs).astype(np.float32)


def test_signs_are_balanced_in_every_bit() -> None:
    matrix = _sign_matrix(256, np.arange(100_000))
    z = matrix.sum(axis=0) / np.sqrt(len(matrix))  # standard normal per output
    assert np.abs(z).max() < 4.5
    assert 0.75 < (z**2).mean() < 1.3


@pytest.mark.parametrize("stride", [1, 576, 4096, 65536])
def test_outputs_are_uncorrelated_for_any_stride_of_parameters(stride: int) -> None:
    # Strides of hidden sizes and powers of two: a weak mixer shows structure there.
    n = 20_000
    matrix = _sign_matrix(192, np.arange(n) * stride)
    z = (matrix.T @ matrix)[np.triu_indices(192, 1)] / np.sqrt(n)
    assert np.abs(z).max() < 5.2  # 18,336 pairs: P < 0.004
    assert abs((z**2).mean() - 1) < 0.06


@pytest.mark.parametrize("stride", [1, 576, 2**20])
def test_parameters_are_uncorrelated(stride: int) -> None:
    d = 16_384
    matrix = _sign_matrix(d, np.arange(200) * stride)
    z = (matrix @ matrix.T)[np.triu_indices(200, 1)] / np.sqrt(d)
    assert np.abs(z).max() < 5.2
    assert abs((z**2).mean() - 1) < 0.06


def test_seeds_that_differ_in_one_bit_give_unrelated_matrices() -> None:
    base = _sign_matrix(128, np.arange(4000), seed=0)
    for bit in range(63):
        other = _sign_matrix(128, np.arange(4000), seed=1 << bit)
        assert abs((base * other).sum()) / np.sqrt(base.size) < 4.5


def test_one_input_bit_flips_half_of_the_word() -> None:
    keys = randomness.derive_keys(ProjectionSpec("rademacher", p=1, d=1))
    j = np.arange(20_000)
    base = randomness.words(keys, j, np.arange(1))
    for bit in range(31):
        flipped = base ^ randomness.words(keys, j ^ (1 << bit), np.arange(1))
        share = np.unpackbits(flipped.view(np.uint8).reshape(-1, 4), axis=1).mean(axis=0)
        assert np.abs(share - 0.5).max() < 0.018, bit  # 5 standard deviations


@pytest.mark.parametrize(("d", "s"), [(4096, 8), (4097, 8), (100, 7), (7, 7), (1, 1)])
def test_sjlt_outputs_are_distinct_and_stay_in_their_range(d: int, s: int) -> None:
    spec = ProjectionSpec("sjlt", p=10_000, d=d, s=s)
    outputs, _ = randomness.sjlt_entries(spec, np.arange(10_000))
    bounds = randomness.sjlt_bounds(spec)
    assert (outputs >= bounds[:-1]).all()
    assert (outputs < bounds[1:]).all()
    assert set(np.unique(outputs)) == set(range(d))


@pytest.mark.parametrize("stride", [1, 512, 576, 1536, 4096])
def test_sjlt_outputs_are_uniform_for_any_stride_of_parameters(stride: int) -> None:
    spec = ProjectionSpec("sjlt", p=2**31 - 1, d=4096)
    n = 51_200
    outputs, sign = randomness.sjlt_entries(spec, np.arange(n) * stride)
    counts = np.bincount(outputs.ravel(), minlength=4096)
    chi2 = ((counts - n / 512) ** 2 / (n / 512)).sum() / (4096 - 8)
    assert abs(chi2 - 1) < 0.1  # standard deviation 0.022
    assert abs(sign.sum()) / np.sqrt(sign.size) < 4.5
    signed = np.bincount(outputs.ravel(), sign.ravel(), minlength=4096)
    assert abs((signed**2).mean() / (n / 512) - 1) < 0.1


def test_sjlt_repetitions_are_independent() -> None:
    # Two parameters that meet in one repetition meet in another no more often than chance.
    spec = ProjectionSpec("sjlt", p=2000, d=512)
    outputs, sign = randomness.sjlt_entries(spec, np.arange(2000))
    meet = outputs[:, None, :] == outputs[None, :, :]  # (2000, 2000, 8)
    upper = meet[np.triu_indices(2000, 1)].astype(np.float64)
    chance = 1 / 64
    both = (upper.sum(1) * (upper.sum(1) - 1)).mean()  # ordered pairs of repetitions
    assert abs(upper.mean() / chance - 1) < 0.02
    assert abs(both / (8 * 7 * chance**2) - 1) < 0.05
    gram = (sign.astype(np.float64).T @ sign)[np.triu_indices(8, 1)] / np.sqrt(2000)
    assert np.abs(gram).max() < 4


def test_gaussian_entries_have_the_moments_of_a_normal() -> None:
    spec = ProjectionSpec("gaussian", p=4000, d=500)
    x = randomness.gaussians(spec, np.arange(4000), 500)
    n = x.size
    assert abs(x.mean()) < 4.5 / np.sqrt(n)
    assert abs((x**2).mean() - 1) < 4.5 * np.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 4.5 * np.sqrt(96 / n)
    z = (x.T @ x)[np.triu_indices(500, 1)] / np.sqrt(4000)
    assert np.abs(z).max() < 5.7  # 124,750 pairs
