"""Shared by gradstore's tests: a small store to build and break, a small model with gradients."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gradstore.export.moments import AdamConstants, AdamMoments, ParameterMoments
from gradstore.format.layout import RowStatus
from gradstore.format.names import GenerationName
from gradstore.format.records import GenerationRecord, RowSet, row_hash
from gradstore.storage.local import StoreFiles
from gradstore.storage.location import location
from gradstore.storage.objects import ObjectFiles
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.reader import Store, open_store
from gradstore.store.writer import StoreWriter

PROVENANCE: Mapping[str, Any] = {
    "projection": {"method": "sjlt", "seed": 0, "d": 4, "version": 1, "canary": [0.5, -1.25, 3.0]},
    "parameters": [["a.lora_A", [2, 3], "float32"], ["a.lora_B", [3, 2], "float32"]],
    "tokenizer": {"tokenizer.json": "11" * 32},
    "template": "default",
    "cutoff_len": 512,
}


class StoreKit:
    """Builds records, rows, features and whole stores; everything follows from its arguments."""

    provenance = PROVENANCE
    dim = 4
    unit_rows = 16
    dtype = "float16"

    def record(self, name: str = "train/1", **changes: Any) -> GenerationRecord:
        parsed = GenerationName.parse(name)
        fields: dict[str, Any] = {
            "name": name,
            "role": parsed.role,
            "set": parsed.set,
            "step": parsed.step,
            "run_id": "run",
            "adapter_hash": "aa",
            "effective_seed": 7,
            "projection": {"method": "sjlt", "d": self.dim, "seed": 7},
            "feature": "adam_marginal",
            "optimizer_hash": "bb",
            "learning_rate": 1e-4,
        }
        return GenerationRecord(**{**fields, **changes})

    def rows(self, n: int, first: int = 0) -> RowSet:
        hashes = [row_hash([i, i + 1, i + 2], [-100, i, 3]) for i in range(first, first + n)]
        return RowSet.from_hashes(hashes, [("set one", i) for i in range(n)])

    def features(self, n: int, seed: int = 0) -> np.ndarray:
        """(n, d) float32 over twenty orders of magnitude; row 3 holds a NaN, row 5 only zeros."""
        random = np.random.default_rng(seed)
        size = 10.0 ** random.uniform(-10, 10, (n, 1))
        values = (random.standard_normal((n, self.dim)) * size).astype(np.float32)
        values[3::40, 1] = np.nan
        values[5::40] = 0
        return values

    def fill(
        self, generation: GenerationWriter, values: np.ndarray, units: int | None = None
    ) -> None:
        """Writes the pending units, or the first few of them."""
        for unit in list(generation.pending)[:units]:
            rows = slice(unit.start, unit.stop)
            k = unit.stop - unit.start
            status = np.full(k, RowStatus.OK, np.uint8)
            generation.write_unit(
                unit.index, values[rows], np.ones(k, np.float32), status, np.arange(k)
            )

    def writer(self, path: Path, files: StoreFiles | None = None, **changes: Any) -> StoreWriter:
        return StoreWriter(path, provenance={**self.provenance, **changes}, files=files)

    def add(self, writer: StoreWriter, name: str = "train/1", n: int = 40, **changes: Any) -> str:
        """Commits one generation of n rows."""
        seed = GenerationName.parse(name).step
        generation = writer.begin(
            self.record(name, **changes),
            self.rows(n),
            dim=self.dim,
            dtype=self.dtype,
            unit_rows=self.unit_rows,
        )
        self.fill(generation, self.features(n, seed))
        return generation.commit().sha256

    def content(self, found: Mapping[str, bytes] | Path) -> dict[str, object]:
        """Keep of files, or of a folder's, what a reader may see: all but the store's own id."""
        if isinstance(found, Path):
            paths = [path for path in found.rglob("*") if path.is_file()]
            found = {path.relative_to(found).as_posix(): path.read_bytes() for path in paths}
        seen: dict[str, object] = {}
        for name, data in found.items():
            if name.split("/")[0] in ("staging", "writer.lock"):
                continue
            seen[name] = data if name != "zarr.json" else len(data)
            if name.startswith("commits/"):
                seen[name] = {k: v for k, v in json.loads(data).items()
                              if k not in ("store_uuid", "parent", "sha256")}  # fmt: skip
        return seen

    def build(self, path: Path, *names: str, n: int = 40) -> Store:
        """Makes a store with these generations (default train/1) committed."""
        with self.writer(path) as writer:
            for name in names or ("train/1",):
                self.add(writer, name, n)
        return open_store(path)


@pytest.fixture
def kit() -> StoreKit:
    return StoreKit()


class InBucket:
    """A place in a bucket for a store that shares no disk with who writes.

    Attributes:
        address: of the store.
        lies: where the store lies, if not there.
        keys: secrets of who writes, which nobody is shown.
    """

    keys = ("secret-of-the-tests",)

    def __init__(self, address: str) -> None:
        self.address = self.lies = address

    def files(self) -> dict[str, bytes]:
        """Every file of the store, read past our own code."""
        import obstore
        from obstore.store import S3Store

        _, bucket, prefix = self.address.removeprefix("s3:/").split("/", 2)
        store = S3Store(bucket, prefix=prefix, client_options={"allow_http": True})
        paths = [each["path"] for page in obstore.list(store) for each in page]
        return {path: bytes(obstore.get(store, path).bytes()) for path in paths}

    def change(self, name: str, data: bytes | None) -> None:
        """Write a file past the store's code, or remove it."""
        bucket = ObjectFiles(location(self.address)).bucket  # type: ignore[arg-type]
        bucket.delete([name]) if data is None else bucket.put(name, data)


class InService:
    """The same as `InBucket` of a place behind a service, which has a folder."""

    def __init__(self, service: Any) -> None:
        self.service, self.address, self.lies = service, service.address, service.folder
        self.keys = (service.read_key, service.write_key)

    def files(self) -> dict[str, bytes]:
        paths = [path for path in self.lies.rglob("*") if path.is_file()]
        return {path.relative_to(self.lies).as_posix(): path.read_bytes() for path in paths}

    def change(self, name: str, data: bytes | None) -> None:
        path = self.lies / name
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)


@pytest.fixture
def in_bucket(use_server: Callable[[str], str]) -> Callable[[str], InBucket]:
    """Make an empty place in the bucket of a server."""
    return lambda server: InBucket(use_server(server))


@pytest.fixture
def in_service(service: Any) -> InService:
    """The place of the test's service."""
    return InService(service)


#: Fixtures of the servers of a bucket, by what a test calls them.
SERVERS = {"bucket": "any_server", "moto": "object_server", "seaweedfs": "seaweedfs"}


@pytest.fixture
def server_called(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Address of an object store: moto, seaweedfs, or bucket: the one that answers sooner."""
    return lambda name: str(request.getfixturevalue(SERVERS[name]))


@pytest.fixture(params=["bucket", "service"])
def make_elsewhere(
    request: pytest.FixtureRequest,
    fast_path: Path,
    in_bucket: Callable[[str], InBucket],
    serve_writable: Callable[..., Any],
    server_called: Callable[[str], str],
) -> Callable[[], InBucket | InService]:
    """Make empty places: of a bucket of either server, or one behind a service each."""
    numbers = itertools.count()
    if request.param == "service":
        return lambda: InService(serve_writable(fast_path / f"served-{next(numbers)}"))
    server = server_called(request.param)
    return lambda: in_bucket(server)


@pytest.fixture
def elsewhere(make_elsewhere: Callable[[], InBucket | InService]) -> InBucket | InService:
    """An empty place in a bucket, and one behind a service."""
    return make_elsewhere()


@pytest.fixture(scope="session")
def crashes() -> Any:
    """Load crashes.py, which no import finds."""
    file = Path(__file__).with_name("crashes.py")
    found = importlib.util.spec_from_file_location("crashes", file)
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def fast_path() -> Iterator[Path]:
    """A folder in memory where there is one, for tests that sync thousands of times."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class LlamaKit:
    """Tiny random Llamas under LoRA, rows for them, and plain autograd as the reference."""

    vocabulary = 61
    #: A token whose embedding is infinite in `model(broken=True)`.
    broken_token = 60

    def model(self, *, broken: bool = False, **lora: Any) -> Any:
        """LoRA on every linear layer, its matrices all random: no gradient is trivially zero."""
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
        adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **lora)
        base = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
        model: Any = get_peft_model(base, adapter)
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        if broken:
            model.get_input_embeddings().weight.data[self.broken_token] = torch.inf
        return model

    def rows(self, n: int, seed: int = 5) -> list[dict[str, list[int]]]:
        """Rows of 5 to 24 tokens, the first third of them a prompt without labels."""
        random = np.random.default_rng(seed)
        rows = []
        for length in random.integers(5, 25, n).tolist():
            ids = random.integers(3, self.broken_token, length).tolist()
            prompt = length // 3
            rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
        return rows

    def collate(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Right-pads rows to one batch (b, t)."""
        width = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in rows])

        ones = [[1] * len(row["input_ids"]) for row in rows]
        mask = torch.tensor([one + [0] * (width - len(one)) for one in ones])
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": mask,
        }

    def batches(
        self, rows: Sequence[Mapping[str, list[int]]], size: int
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Batches of `size` rows, in order."""
        for start in range(0, len(rows), size):
            chosen = np.arange(start, min(start + size, len(rows)))
            yield chosen, self.collate([rows[int(i)] for i in chosen])

    def gradients(self, model: Any, rows: Sequence[Mapping[str, list[int]]]) -> torch.Tensor:
        """(n, p) float64 by autograd, one unpadded row at a time."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        model.eval()
        found = []
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]))
            gradient = torch.autograd.grad(loss, parameters)
            found.append(torch.cat([part.reshape(-1) for part in gradient]).double())
        return torch.stack(found)

    def moments(self, model: Any) -> AdamMoments:
        """Moments of about the size that gradients of these models have."""
        generator = torch.Generator().manual_seed(9)
        constants = AdamConstants(0.9, 0.999, 1e-8, 10)
        return AdamMoments(
            {
                name: ParameterMoments(
                    torch.randn(p.shape, generator=generator) * 0.05,
                    (torch.randn(p.shape, generator=generator) * 0.05) ** 2,
                    constants,
                )
                for name, p in model.named_parameters()
                if "lora_" in name  # trainable ones; an open GradientCapture has frozen them
            }
        )


@pytest.fixture(scope="session")
def llama() -> LlamaKit:
    return LlamaKit()
