"""A small store with text, and a client of the service over it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gradstore.format.layout import RowStatus
from gradstore.format.records import GenerationRecord, RowSet, row_hash
from gradstore.format.text_table import Text
from gradstore.serve.app import create_app
from gradstore.serve.served import Served
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.writer import StoreWriter

with warnings.catch_warnings():  # Starlette's client names a deprecated alias of anyio
    warnings.simplefilter("ignore", DeprecationWarning)
    from fastapi.testclient import TestClient

TOKEN = "a-token-for-the-tests"
HOSTILE = (
    "<script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title='taken'\"> & <b>bold</b>",
    "bell \x07, escape \x1b[31mred, null-free, tab\t, \u202eright to left",
    "word " * 210_000,  # more than 1 MB
)
SETS = ("alpha", "beta", "gamma")
WORDS = "add the two numbers spell word backwards convert metres into feet name capital".split()


class ExplorerKit:
    """Builds stores of text rows; everything follows from its arguments."""

    dim = 16
    train_rows = 300
    target_rows = 8

    def build(self, path: Path, *, text: bool = True, steps: Sequence[int] = (4, 8)) -> Path:
        """Commits train and target generations at each step."""
        with self.writer(path) as writer:
            for step in steps:
                self.add(writer, step)
            if text:
                self.keep_texts(writer)
        return path

    def writer(self, path: Path) -> StoreWriter:
        provenance = {"projection": {"method": "sjlt", "d": self.dim}, "template": "default"}
        return StoreWriter(path, provenance=provenance)

    def add(self, writer: StoreWriter, step: int) -> None:
        """Commits train/<step>, target/one/<step> and target/two/<step>."""
        for name, values in (
            (f"train/{step}", self.features(self.train_rows, step)),
            (f"target/one/{step}", self.features(self.target_rows, step + 1000)),
            (f"target/two/{step}", self.features(self.target_rows, step + 2000)),
        ):
            self.begin(writer, name, values).commit()

    def begin(self, writer: StoreWriter, name: str, values: np.ndarray) -> GenerationWriter:
        """Writes all units of a generation; does not commit."""
        *_, step = name.split("/")
        role, set_ = name.split("/")[0], name.split("/")[1] if name.count("/") == 2 else ""
        record = GenerationRecord(
            name=name, role="train" if role == "train" else "target", set=set_, step=int(step),
            run_id="run", adapter_hash="aa", effective_seed=7,
            projection={"method": "sjlt", "d": self.dim, "seed": 7}, feature="sgd",
            optimizer_hash="bb", learning_rate=1e-4,
        )  # fmt: skip
        generation = writer.begin(record, self.rows(set_, len(values)), dim=self.dim, unit_rows=64)
        for unit in list(generation.pending):
            part = values[unit.start : unit.stop]
            status = np.full(len(part), RowStatus.OK, np.uint8)
            norm = np.linalg.norm(np.nan_to_num(part), axis=1).astype(np.float32)
            tokens = np.arange(unit.start, unit.stop) % 37 + 1
            generation.write_unit(unit.index, part, norm, status, tokens)
        return generation

    def rows(self, set_: str, n: int) -> RowSet:
        start = {"": 0, "one": 10_000, "two": 20_000}[set_]
        hashes = [row_hash([i, i + 1], [-100, i]) for i in range(start, start + n)]
        names = [set_ or SETS[i % 3] for i in range(n)]
        return RowSet.from_hashes(hashes, [(name, i) for i, name in enumerate(names)])

    def features(self, n: int, seed: int) -> np.ndarray:
        """(n, d) float32; training row 5 is all zeros, row 7 holds a NaN."""
        random = np.random.default_rng(seed)
        values = random.standard_normal((n, self.dim)).astype(np.float32)
        if n == self.train_rows:
            values[5], values[7, 0] = 0, np.nan
        return values

    def keep_texts(self, writer: StoreWriter) -> None:
        writer.keep_texts(self.rows("", self.train_rows), map(self.text, range(self.train_rows)))
        for set_ in ("one", "two"):
            texts = [
                Text(f"{set_}: what is {i} plus {i}?", f"It is {i + i}.", 12) for i in range(8)
            ]
            writer.keep_texts(self.rows(set_, self.target_rows), texts)

    def model(self) -> Any:
        """A stand-in for a loaded model: row 40 taught everything, row 41 spoils it."""
        values = np.linspace(-0.5, 0.5, self.train_rows, dtype=np.float32)
        values[[5, 7]], values[40], values[41] = np.nan, 0.9, -0.9

        class Model:
            def __init__(self) -> None:
                self.asked: list[dict[str, Any]] = []

            def explain(
                self, prompt: str, response: str | None, top: int, *,
                on_stage: Any, on_rows: Any, **asked: Any,
            ) -> Any:  # fmt: skip
                on_stage("asking the model")
                self.asked.append(asked)
                on_rows(len(values))
                step = 8 if asked["step"] is None else asked["step"]
                return SimpleNamespace(
                    prompt=prompt,
                    response=response or "generated answer",
                    generated=response is None,
                    generations=(f"{asked['run']}/train/{step}".lstrip("/"),),
                    values=values,
                )

        return Model()

    def text(self, i: int) -> Text:
        """Row 10 to 13 hold hostile text."""
        if 10 <= i < 10 + len(HOSTILE):
            return Text(HOSTILE[i - 10], f"answer {i} {HOSTILE[i - 10]}", 9)
        picked = " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(6))
        return Text(f"Please {picked}: {i}", f"It is {i}.", 9)


@pytest.fixture
def token() -> str:
    return TOKEN


@pytest.fixture(scope="session")
def explorer() -> ExplorerKit:
    return ExplorerKit()


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory, explorer: ExplorerKit) -> Path:
    """A store that no test changes."""
    return explorer.build(tmp_path_factory.mktemp("served") / "gradstore")


@pytest.fixture
def ask() -> Iterator[Callable[..., TestClient]]:
    """Opens clients of a store, with the token."""
    opened = []

    def client(path: Path, explainer: Any = None, **headers: str) -> TestClient:
        app = create_app(Served(path, explainer), TOKEN)
        sent = {"Authorization": f"Bearer {TOKEN}", **headers}
        entered = TestClient(app, base_url="http://127.0.0.1", headers=sent)
        opened.append(entered)
        return entered.__enter__()

    yield client
    for each in opened:
        each.__exit__(None, None, None)


@pytest.fixture
def client(ask: Callable[..., TestClient], store_path: Path) -> TestClient:
    return ask(store_path)
