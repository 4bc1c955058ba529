"""Rows of several domains, without LlamaFactory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from dataflex.data.rows import IGNORED, Domains, Rows, RunData


@pytest.fixture
def logging_seam() -> Callable[[type], tuple[Any, list[dict[str, float]]]]:
    """`logging_seam(Seam)` -> one over a Trainer that only logs, and the lines that it gets."""

    def make(seam: type) -> tuple[Any, list[dict[str, float]]]:
        class Base:
            def log(self, logs: dict[str, float]) -> None:
                lines.append(logs)

        lines: list[dict[str, float]] = []
        made: Any = object.__new__(type("Logged", (seam, Base), {}))
        made._numbers = {}
        return made, lines

    return make


@pytest.fixture
def domain_data() -> Callable[..., RunData]:
    """`domain_data([100, 20], masked=[3])` -> RunData of domains "a", "b"; row 3 has no target."""

    def make(sizes: Sequence[int], masked: Sequence[int] = ()) -> RunData:
        from datasets import Dataset

        n = sum(sizes)
        labels = [[IGNORED, IGNORED if i in masked else i] for i in range(n)]
        dataset = Dataset.from_dict({"input_ids": [[1, i] for i in range(n)], "labels": labels})
        names = tuple("abcdefgh"[: len(sizes)])
        of_row = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        nothing: Any = None
        return RunData(Rows("train", dataset), (), nothing, "default", nothing, "sft",
                       Domains(names, of_row))  # fmt: skip

    return make
