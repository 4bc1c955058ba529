"""Products of packed rows where they are looked up, as on a GPU, and where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradstore.scoring.byte_tables import ByteTables, packed_products


@pytest.mark.parametrize("dim", [5, 64, 100])
def test_bytes_looked_up_give_the_products_of_the_signs(dim: int) -> None:
    rng, device = np.random.default_rng(dim), torch.device("cpu")
    bits = np.packbits(rng.integers(0, 2, (9, dim), dtype=np.uint8), axis=1, bitorder="little")
    queries = rng.standard_normal((3, dim), dtype=np.float32)
    signs = 2.0 * np.unpackbits(bits, axis=1, count=dim, bitorder="little") - 1
    for products in (ByteTables(queries, device).products, packed_products(queries, device)):
        np.testing.assert_allclose(products(bits), signs @ queries.T, atol=1e-4)
