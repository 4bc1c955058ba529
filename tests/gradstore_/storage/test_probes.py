"""What a store needs of the machine."""

from __future__ import annotations

import pytest

from gradstore.errors import BadInput
from gradstore.storage.probes import check_zarr


def test_old_zarr_is_refused() -> None:
    check_zarr("3.1.3")
    check_zarr("4.0")
    with pytest.raises(BadInput, match=r"zarr 3\.1\.2 is installed"):
        check_zarr("3.1.2")
